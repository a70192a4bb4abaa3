"""The task plugins that ship with the framework; found through their entry points, like anybody's."""
