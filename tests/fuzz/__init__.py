"""Coverage-guided fuzzing of all that reads bytes from elsewhere: `make fuzz`."""
