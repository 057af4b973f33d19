"""What the project is made of: its packages, listed for those who audit them."""
