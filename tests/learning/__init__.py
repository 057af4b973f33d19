"""Does mixing help."""
