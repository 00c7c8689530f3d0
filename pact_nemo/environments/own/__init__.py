"""The user's own agent: tools from a class, a module or an MCP server, tasks and conversations from files."""
