"""Generation by a server that speaks OpenAI's protocol: vLLM, SGLang, Ray Serve LLM, llm-d."""
