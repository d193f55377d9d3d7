// One client: from its first byte to its last.
//
// What it sends is cut into messages, checked, and queued; its turns with the engine are given by
// the scheduler. A session outlives the engine thread: when that is ended and booted again, the
// session's settings and prepared statements are put back before its next statement.
import { randomBytes } from 'node:crypto'

import { encodingRefusal, isKnownEncoding } from './commands.mjs'
import { Inbox } from './inbox.mjs'
import { ReplyScanner } from './replies.mjs'
import { SessionSettings } from './session-settings.mjs'
import { Startup, requestedSettings } from './startup.mjs'
import { Statements } from './statements.mjs'
import { checkMessage, frontendFrameLength } from './validate.mjs'
import {
  BACKEND,
  FRONTEND,
  FrameReader,
  HEADER_BYTES,
  ProtocolError,
  authenticationOk,
  backendKey,
  copyFailMessage,
  errorResponse,
  isFollowedByReady,
  negotiateVersion,
  parameterStatus,
  queryMessage,
  readCString,
  readyForQuery,
  syncMessage,
} from './wire.mjs'

const STARTUP_WITHIN_MS = 60_000
// A start that asks for settings waits so long for a session that owns the engine; then it is
// answered all the same, and the settings are confirmed at the first statement.
const PROOF_WITHIN_MS = 100
const IDLE_IN_TRANSACTION_MS = 60_000
const CANCEL_GRACE_MS = 200
const VANISHED_GRACE_MS = 10_000
const LAST_WORDS_WITHIN_MS = 5000
const INBOX_BYTES_MAX = 16 * 1024 * 1024
const OUTBOX_BYTES_MAX = 8 * 1024 * 1024

export class Session {
  #bridge
  #socket
  #frames = new FrameReader(frontendFrameLength)
  #startup = new Startup()
  #inbox = new Inbox()
  // 'starting', until it has been told that it may send; 'ready'; 'closed'; 'gone', cleaned up.
  #phase = 'starting'
  #startTimer = null
  #settings = null
  // The engine waits for a Sync before it is out of this session's hands.
  #needsSync = false
  // After an engine that was ended in mid-group: the rest of the group is void.
  #discardsUntilSync = false
  #began = false
  #running = false
  #endText = null
  #wakeCopy = null
  #proceed = null
  #idleSince = 0

  // The transaction status that the client was last told: 'I', 'T' or 'E'.
  status = 'I'
  queued = false
  user = ''
  superuser = false
  secret = randomBytes(4).readInt32BE(0)

  constructor(bridge, socket, pid) {
    this.#bridge = bridge
    this.#socket = socket
    this.pid = pid
    this.statements = new Statements(bridge.engine, pid)
    this.#startTimer = setTimeout(() => this.#end(), STARTUP_WITHIN_MS)
    socket.on('data', (bytes) => this.#receive(bytes))
    socket.on('drain', () => this.#drained())
    socket.on('error', () => {})
    socket.on('close', () => this.#end())
  }

  get registry() {
    return this.#bridge.sessions
  }

  get catalog() {
    return this.#bridge.catalog
  }

  get isOpen() {
    return this.#phase === 'starting' || this.#phase === 'ready'
  }

  describe() {
    return {
      session: this.pid,
      user: this.user,
      status: this.status,
      phase: this.#phase,
      running: this.#running,
      needs_sync: this.#needsSync,
      discards_until_sync: this.#discardsUntilSync,
      queued: this.queued,
      inbox_bytes: this.#inbox.bytes,
      idle_ms: this.#idleSince > 0 ? Math.round(performance.now() - this.#idleSince) : 0,
    }
  }

  // ---- what the scheduler asks

  // Leaving needs no database to be opened: what is to be cleaned up is gone with the engine.
  get database() {
    return this.isOpen ? this.databaseName : null
  }

  get hasWork() {
    if (this.#phase === 'closed') return true
    return this.#phase === 'ready' && this.#inbox.hasGroup
  }

  mayOpen(database) {
    if (this.#bridge.catalog.databases.has(database)) return true
    this.fatal('57P01', `terminating connection because database "${database}" was dropped`)
    return false
  }

  refuse(sqlstate, text) {
    this.fatal(sqlstate, text)
  }

  async turn() {
    if (this.#phase === 'starting') return this.#proveStart()
    if (this.#phase === 'closed') return this.#cleanUp()
    if (this.#phase === 'gone' || !this.#inbox.hasGroup) return
    this.#bridge.scheduler.active = true
    if (this.#bridge.scheduler.owner !== this) {
      if (!(await this.#succeeds(this.#settings.takeOver()))) return
    }
    // Whatever was awaited, the client may have left or withdrawn its statement meanwhile.
    if (this.#phase !== 'ready' || !this.#inbox.hasGroup) return
    this.#bridge.scheduler.own(this)
    this.#idleSince = 0
    const messages = this.#inbox.takeGroup()
    this.#resumeReading()
    if (messages.at(-1)[0] === FRONTEND.terminate) return this.#end()
    if (this.#discardsUntilSync) return this.#discard(messages)
    await this.#runGroup(messages)
  }

  // Called a few times a second while this session owns the engine.
  watchIdle(now) {
    const limit = this.#settings.timeouts.idleMs || IDLE_IN_TRANSACTION_MS
    if (this.#idleSince > 0 && now - this.#idleSince > limit) {
      this.fatal('25P03', 'terminating connection due to idle-in-transaction timeout')
    }
  }

  // ---- bytes in and out

  #receive(bytes) {
    if (!this.isOpen) return
    try {
      if (this.#startup.done) this.#frames.push(bytes)
      else this.#begin(bytes)
      if (this.#startup.done) this.#readMessages()
    } catch (error) {
      if (error instanceof ProtocolError) return this.fatal('08P01', error.message)
      this.#bridge.log('session failed', { error: error.stack })
      this.fatal('XX000', 'the bridge has failed, see its log')
    }
  }

  #readMessages() {
    let frame
    while (this.isOpen && (frame = this.#frames.next())) {
      checkMessage(frame)
      this.#inbox.add(frame)
    }
    if (this.#wakeCopy && !this.#inbox.isEmpty) this.#wakeCopy()
    else if (this.#phase === 'ready' && this.#inbox.hasGroup && !this.#running) {
      this.#bridge.scheduler.request(this)
    }
    // More is read only when what is there has been used, but for a group that is not whole yet.
    if (this.#inbox.bytes > INBOX_BYTES_MAX && (this.#inbox.hasGroup || this.#running)) {
      this.#socket.pause()
    }
  }

  #resumeReading() {
    if (this.#inbox.bytes <= INBOX_BYTES_MAX && this.#socket.isPaused()) this.#socket.resume()
  }

  #send(bytes) {
    if (this.isOpen) this.#socket.write(bytes)
  }

  #sendAll(parts) {
    if (parts.length === 1) return this.#send(parts[0])
    this.#socket.cork()
    for (const part of parts) this.#send(part)
    this.#socket.uncork()
  }

  #admitNextChunk(proceed) {
    if (!this.isOpen || this.#socket.writableLength < OUTBOX_BYTES_MAX) return proceed()
    this.#idleSince = performance.now()
    this.#proceed = proceed
  }

  #drained() {
    const proceed = this.#proceed
    if (!proceed) return
    this.#proceed = null
    this.#idleSince = 0
    proceed()
  }

  // ---- starting

  #begin(bytes) {
    const step = this.#startup.push(bytes)
    for (const reply of step.replies) this.#send(reply)
    if (step.cancel) {
      this.registry.cancel(step.cancel)
      return this.#end()
    }
    if (step.refusal) return this.fatal(step.refusal.sqlstate, step.refusal.text)
    if (!this.#startup.done) return
    const { parameters, unknownOptions, minorVersion, rest } = this.#startup
    if (minorVersion > 0 || unknownOptions.length > 0) this.#send(negotiateVersion(unknownOptions))
    if (rest.length > 0) this.#frames.push(rest)
    this.user = parameters.get('user') ?? ''
    this.databaseName = parameters.get('database') || this.user
    this.#admit(parameters)
  }

  #admit(parameters) {
    const { catalog, scheduler } = this.#bridge
    const refusal = catalog.refusal(this.user, this.databaseName)
    if (refusal) return this.fatal(refusal.sqlstate, refusal.text)
    if (this.registry.isFull) return this.fatal('53300', 'sorry, too many clients already')
    this.registry.add(this)
    this.superuser = catalog.roles.get(this.user).superuser
    const requested = requestedSettings(parameters)
    const encoding = requested.get('client_encoding') ?? 'UTF8'
    if (!isKnownEncoding(encoding)) {
      const { sqlstate, text } = encodingRefusal(encoding)
      return this.fatal(sqlstate, text)
    }
    this.#settings = new SessionSettings({
      engine: this.#bridge.engine,
      catalog,
      user: this.user,
      database: this.databaseName,
      requested,
      onChange: (name, value) => {
        if (this.#phase === 'ready') this.#send(parameterStatus(name, value))
      },
    })
    if (!this.#settings.mustBeProven) return this.#answerStart()
    this.#awaitProof()
    scheduler.request(this)
  }

  // An engine that is being booted will soon be free; one that a session owns may not be.
  #awaitProof() {
    clearTimeout(this.#startTimer)
    this.#startTimer = setTimeout(() => {
      if (this.#bridge.scheduler.owner === null) this.#awaitProof()
      else this.#answerStart()
    }, PROOF_WITHIN_MS)
  }

  // In the scheduler's turn: the engine says whether the settings are good.
  async #proveStart() {
    if (await this.#succeeds(this.#settings.prove())) this.#answerStart()
  }

  #answerStart() {
    if (this.#phase !== 'starting') return
    clearTimeout(this.#startTimer)
    this.#startTimer = null
    this.#settings.expect()
    const parts = [authenticationOk()]
    for (const [name, value] of this.#settings.reported) parts.push(parameterStatus(name, value))
    parts.push(backendKey(this.pid, this.secret), readyForQuery('I'))
    this.#phase = 'ready'
    this.#send(Buffer.concat(parts))
    if (this.#inbox.hasGroup) this.#bridge.scheduler.request(this)
  }

  // ---- running

  async #runGroup(messages) {
    const { engine } = this.#bridge
    const group = this.statements.prepare(messages, this)
    if (group.isOnlyFlush) return this.#passOn()
    this.#settings.expectChanges(group)
    const answer = this.#watchAnswer(group)
    const timer = this.#limitTime()
    this.#running = true
    const { died } = await engine.run(group.bytes, {
      onOutput: (bytes) => this.#sendAll(answer.scanner.push(bytes)),
      onNeed: () => this.#feedCopy(),
      admitNextChunk: (proceed) => this.#admitNextChunk(proceed),
    })
    this.#running = false
    this.#idleSince = 0
    clearTimeout(timer)
    this.#resumeReading()
    if (died) return this.#engineDied(died, group, answer)
    if (group.hasQuery) this.statements.forgetUnnamed()
    if (!answer.failed) group.succeeded()
    this.#needsSync = answer.status === null
    if (answer.status !== null) this.status = answer.status
    if (this.#settings.mayHaveChanged && !this.#needsSync) {
      await this.#succeeds(this.#settings.follow(this.status, group, answer))
    }
    if (answer.heldReady) this.#send(answer.heldReady)
    this.#passOn()
  }

  // Follows the answer to a group. When something may have changed that the client must be told
  // before it goes on, the final ReadyForQuery is held back.
  #watchAnswer(group) {
    const holdsReady = this.#settings.mayHaveChanged
    const replies = group.replies.values()
    const answer = { status: null, failed: false, discardedAll: false, heldReady: null }
    answer.scanner = new ReplyScanner((type, bytes) => {
      switch (type) {
        case BACKEND.parseComplete:
        case BACKEND.closeComplete: {
          const reply = replies.next().value
          reply?.commit()
          return reply?.shown ?? true
        }
        case BACKEND.commandComplete:
          this.#completed(readCString(bytes, HEADER_BYTES)[0], answer)
          return true
        case BACKEND.error:
          answer.failed = true
          return true
        case BACKEND.readyForQuery:
          answer.status = String.fromCharCode(bytes[HEADER_BYTES])
          if (!holdsReady) return true
          answer.heldReady = Buffer.from(bytes)
          return false
        default:
          // Notifications and parameters of the engine are not this client's.
          return false
      }
    })
    return answer
  }

  #completed(tag, answer) {
    switch (tag) {
      case 'BEGIN':
      case 'START TRANSACTION':
        this.#began = true
        break
      case 'COMMIT':
        this.#began = false
        break
      case 'DISCARD ALL':
        answer.discardedAll = true
        this.statements.forgetAll()
        break
      case 'DEALLOCATE ALL':
        this.statements.forgetAll()
        break
    }
  }

  #passOn() {
    if (this.status === 'I' && !this.#needsSync) {
      this.#began = false
      this.#bridge.scheduler.release(this)
    } else if (!this.#inbox.hasGroup) {
      this.#idleSince = performance.now()
    }
  }

  // ---- COPY

  #feedCopy() {
    const { engine } = this.#bridge
    this.#wakeCopy = null
    if (!this.isOpen) return engine.feed(copyFailMessage('the client has disconnected'))
    const messages = this.#inbox.takeCopyInput()
    this.#resumeReading()
    if (messages === null) {
      engine.feed(copyFailMessage('another message was sent during COPY'))
      return this.fatal('08P01', 'unexpected message type during COPY from stdin')
    }
    if (messages.length > 0) {
      this.#idleSince = 0
      return engine.feed(messages.length === 1 ? messages[0] : Buffer.concat(messages))
    }
    this.#idleSince = performance.now()
    this.#wakeCopy = () => this.#feedCopy()
  }

  // ---- interruption

  #limitTime() {
    const limit = this.#settings.timeouts.statementMs
    if (limit === 0) return null
    return setTimeout(() => this.#interrupt('canceling statement due to statement timeout'), limit)
  }

  // A statement that has not begun is withdrawn; one that runs is given a moment to end by itself,
  // because to end it otherwise is to boot the engine again.
  cancel() {
    const text = 'canceling statement due to user request'
    const { engine, scheduler } = this.#bridge
    const waits = !this.#running && this.#inbox.hasGroup
    if (this.#running || (waits && scheduler.owner === this)) {
      const run = engine.runs + (waits ? 1 : 0)
      setTimeout(() => {
        if (this.#running && engine.runs === run) this.#interrupt(text)
      }, CANCEL_GRACE_MS)
    } else if (waits && this.#phase === 'ready') {
      const messages = this.#inbox.takeGroup()
      this.#answerCanceled(text, isFollowedByReady(messages.at(-1)[0]))
    }
  }

  #interrupt(text) {
    if (!this.#running) return
    if (this.#wakeCopy) {
      this.#wakeCopy = null
      this.#bridge.engine.feed(copyFailMessage(text))
    } else {
      this.#endText = text
      this.#bridge.engine.kill(text)
    }
  }

  #answerCanceled(text, endsInReady) {
    this.#send(errorResponse({ sqlstate: '57014', text }))
    if (endsInReady) this.#send(readyForQuery(this.status))
    else this.#discardsUntilSync = true
  }

  async #engineDied(reason, group, { scanner }) {
    const { scheduler } = this.#bridge
    const text = this.#endText
    this.#endText = null
    this.#needsSync = false
    this.#settings.forgetChanges()
    const inBlock = this.status !== 'I' || this.#began
    this.status = 'I'
    if (text === null) {
      this.fatal('57P02', `terminating connection because the database engine ended: ${reason}`)
    } else if (scanner.isMidMessage) {
      // Half of a row cannot be taken back, so nothing else can be said.
      this.#end()
    } else if (this.isOpen) {
      if (inBlock) await this.#restoreFailedTransaction()
      this.#answerCanceled(text, group.endsInReady)
    }
    if (this.status === 'I') scheduler.release(this)
    else this.#idleSince = performance.now()
  }

  // As in a server, what follows a canceled statement in its transaction must fail, not run.
  async #restoreFailedTransaction() {
    const { engine, scheduler } = this.#bridge
    await scheduler.reopen(this.databaseName)
    if (!(await this.#succeeds(this.#settings.takeOver()))) return
    await engine.query('BEGIN')
    const { status } = await engine.query('SELECT 1 / 0')
    this.status = status
  }

  #discard(messages) {
    if (messages.at(-1)[0] === FRONTEND.sync) {
      this.#discardsUntilSync = false
      this.#send(readyForQuery(this.status))
    }
    this.#passOn()
  }

  // ---- leaving

  // Awaits a step that yields an error or null; an error ends the session.
  async #succeeds(step) {
    const error = await step
    return error ? this.fatal(error.C, error.M) : true
  }

  // Tells the client why, and ends the session. Returns false, as a failed step does.
  fatal(sqlstate, text) {
    this.#send(errorResponse({ severity: 'FATAL', sqlstate, text }))
    this.#end()
    return false
  }

  #end() {
    if (!this.isOpen) return
    const started = this.#phase === 'ready'
    clearTimeout(this.#startTimer)
    this.#phase = started ? 'closed' : 'gone'
    this.#inbox.clear()
    this.#socket.end()
    this.#socket.resume()
    setTimeout(() => this.#socket.destroy(), LAST_WORDS_WITHIN_MS).unref()
    this.#drained()
    if (this.#wakeCopy) this.#wakeCopy()
    if (!started) return this.registry.remove(this)
    if (this.#running) this.#endAbandonedRun()
    this.#bridge.scheduler.request(this)
  }

  // Nobody waits for the answer, and all others wait for the engine.
  #endAbandonedRun() {
    const { engine } = this.#bridge
    const run = engine.runs
    const timer = setTimeout(() => {
      if (this.#running && engine.runs === run) engine.kill('the client has disconnected')
    }, VANISHED_GRACE_MS)
    timer.unref()
  }

  async #cleanUp() {
    const { engine, scheduler } = this.#bridge
    this.#phase = 'gone'
    this.registry.remove(this)
    const messages = this.#needsSync ? [syncMessage()] : []
    if (scheduler.owner === this) messages.push(queryMessage('ROLLBACK'))
    if (engine.database === this.databaseName) messages.push(...this.statements.closeMessages())
    if (engine.running && messages.length > 0) {
      messages.push(syncMessage())
      await engine.run(Buffer.concat(messages), { onOutput: () => {} })
      engine.unnamedOwner = null
    }
    // Settings that the transaction had changed have just been rolled back unseen.
    if (this.#settings.mayHaveChanged) engine.stateKey = null
    scheduler.release(this)
  }
}
