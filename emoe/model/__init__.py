"""What a model says of itself: its structure, its parameters, their layout in a slot."""
