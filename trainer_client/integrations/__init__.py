"""Headrace in other people's training loops; each module needs its framework installed.

huggingface    Hugging Face's Trainer, and loops on Accelerate
lightning      Lightning's data module and callback
torchtitan     torchtitan's BaseDataLoader, of both its import paths
megatron       iterators for `--dataloader-type external`
"""
