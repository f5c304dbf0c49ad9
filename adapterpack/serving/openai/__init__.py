"""OpenAI's API as structs: requests, answers, streams, errors."""
