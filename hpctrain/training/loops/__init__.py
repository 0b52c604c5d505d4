"""Loops of the user's own: the world that they run in, and a run that saves, stops and resumes."""
