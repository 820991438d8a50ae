"""The typed sections of the configuration, one file a concern. Every key carries its description."""
