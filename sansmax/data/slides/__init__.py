"""Slides and other huge pictures: read by region in micrometres, tissue found, tiles laid out."""
