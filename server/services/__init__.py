"""Use cases: the rules of the service, one class per proto service, and the ports to what they need from outside."""
