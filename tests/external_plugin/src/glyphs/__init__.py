"""Letters and how far they lean: a plugin of crosstitch."""
