"""A real LiteLLM in front of a provider whose answers, and so whose bills, are known in advance."""
