// All sessions, by the number under which a client may ask to cancel its statement.

const SESSIONS_MAX = 200
const PID_FIRST = 1000

export class Registry {
  #sessions = new Map()
  #lastPid = PID_FIRST

  nextPid() {
    return ++this.#lastPid
  }

  get isFull() {
    return this.#sessions.size >= SESSIONS_MAX
  }

  get size() {
    return this.#sessions.size
  }

  add(session) {
    this.#sessions.set(session.pid, session)
  }

  remove(session) {
    this.#sessions.delete(session.pid)
  }

  all() {
    return [...this.#sessions.values()]
  }

  othersIn(database, session) {
    return this.all().filter(
      (other) => other !== session && other.isOpen && other.databaseName === database,
    )
  }

  // Only who was told the secret may cancel; a wrong one is not answered, as in a server.
  cancel({ pid, secret }) {
    const session = this.#sessions.get(pid)
    if (session?.secret === secret) session.cancel()
  }
}
