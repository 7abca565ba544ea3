"""`mobiquant serve`: an HTTP server in the form of the OpenAI API. Needs the extra `server` (starlette, uvicorn).

protocol: bodies to calls · pool: calls to sessions, in a bounded queue · metrics: counters · app: routes and limits.
"""
