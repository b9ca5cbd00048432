"""`specops inspect`: figures, guesses, bad files, output."""
