"""The services that run in the background, and the one lifecycle they share."""
