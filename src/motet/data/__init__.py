"""Preference pairs: read from files and hubs, dealt to clients, and one small set that ships with the package."""
