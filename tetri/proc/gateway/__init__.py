"""The HTTP gateway: OpenAI's API for clients that know nothing of tetri. A client of the broker like any other.

`process` starts it, `connection` limits what one TCP connection may do, `guard` lets requests in, `api` has the
endpoints, `answers` serves completions, and `tokens` tokenises. The names of JSON's fields are in wire/openai.

For those who look on, `observatory` asks the broker, `history` has the last minutes, `frames` makes the messages of the
live stream, `live` has the endpoints, and `page_files` serves the files of page/.
"""
