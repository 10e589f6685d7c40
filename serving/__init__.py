"""What people use: the live policy behind an endpoint, and the page for spot checks."""
