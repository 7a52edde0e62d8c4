"""Models of libraries that this package does not depend on, in an environment of their own."""
