// An agent for `@ag-ui/client` that speaks to AgentConsumer. It needs that package and rxjs.

import { AbstractAgent } from "@ag-ui/client";
import { Observable } from "rxjs";

export class DjangoAgent extends AbstractAgent {
  constructor({ url, ...config }) {
    super(config);
    this.url = url;
  }

  // Only what is new: the session has the rest, and a frame has 64 KiB.
  run({ threadId, runId, messages, resume, forwardedProps }) {
    this.runId = runId;
    const said = resume?.length ? { messages: [], resume } : { messages: messages.slice(-1) };
    return this.exchange({ threadId, runId, ...said, forwardedProps });
  }

  connect() {
    return this.exchange({ type: "sync" });
  }

  abortRun() {
    this.socket?.send(JSON.stringify({ type: "abort", runId: this.runId }));
  }

  exchange(frame) {
    return new Observable((events) => {
      const socket = (this.socket = new WebSocket(this.url));
      socket.onopen = () => socket.send(JSON.stringify(frame));
      socket.onclose = ({ code }) => events.error(new Error(`Closed with ${code}`));
      socket.onmessage = ({ data }) => {
        const { chunk } = JSON.parse(data);
        // A snapshot within a run repeats what was streamed, unless it begins a branch.
        const repeats = frame.runId && !frame.forwardedProps?.agentSessions;
        if (!chunk || (repeats && chunk.type === "MESSAGES_SNAPSHOT")) return;
        events.next(chunk);
        if (/^RUN_(FINISHED|ERROR)$/.test(chunk.type)) events.complete();
      };
      return () => socket.close();
    });
  }
}
