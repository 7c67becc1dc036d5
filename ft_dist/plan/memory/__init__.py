"""Peak memory of a step, tensor by tensor."""
