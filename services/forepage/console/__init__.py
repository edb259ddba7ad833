"""What an operator reads in a terminal: what runs now, and what happened to one request."""
