"""Images and audio of requests, prepared as the arrays that a graph takes."""
