"""The APIs of a server, one module each. Each registers its routes and the engines that it supports."""
