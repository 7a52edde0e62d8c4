"""The transform: a walk over a jaxpr in which chosen weights act as `W + gamma A B`."""
