"""A Flower app: clients that hold different classes of a text corpus train adapters and a head together."""
