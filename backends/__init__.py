"""Where tokens come from. Bytes only: nothing here knows a chat, a dialect or an agent."""
