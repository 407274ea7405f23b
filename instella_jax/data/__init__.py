"""Where training pictures come from: embedded scenes, the user's folders, and their loader."""
