// An agent for `@ag-ui/client` that speaks to AgentConsumer. It needs that package and rxjs.

import { AbstractAgent } from "@ag-ui/client";
import { Observable } from "rxjs";

export class DjangoAgent extends AbstractAgent {
  constructor({ url, ...config }) {
    super(config);
    this.url = url;
  }

  // Only what is new: the session has the rest, and a frame has 64 KiB.
  run({ threadId, runId, messages, resume }) {
    this.runId = runId;
    return this.exchange(
      resume?.length
        ? { threadId, runId, messages: [], resume }
        : { threadId, runId, messages: messages.slice(-1) },
    );
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
        // A snapshot within a run repeats what was streamed.
        if (!chunk || (frame.runId && chunk.type === "MESSAGES_SNAPSHOT")) return;
        events.next(chunk);
        if (/^RUN_(FINISHED|ERROR)$/.test(chunk.type)) events.complete();
      };
      return () => socket.close();
    });
  }
}
