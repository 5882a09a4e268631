"""The HTTP gateway: OpenAI's API for clients that know nothing of tetri. A client of the broker like any other.

`process` starts it, `connection` limits what one TCP connection may do, `guard` lets requests in, `api` has the
endpoints, `answers` serves completions, and `tokens` tokenises. The names of JSON's fields are in wire/openai.
"""
