"""Bags: the features of the tiles of one slide with their places, whoever wrote them, and the labels of patients."""
