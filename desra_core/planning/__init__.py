"""What the settings want of every image, as keys, and what is left to do: `keys`, `plan`, `tables`."""
