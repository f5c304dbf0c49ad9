"""Prepares the images and audio of requests as the arrays that a graph takes."""
