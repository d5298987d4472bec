"""What a user may ask for: compositions of the rooms."""
