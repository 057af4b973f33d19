"""Mixing policies: observations in, mixtures out."""
