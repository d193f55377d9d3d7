// The settings of one session: how it started, what it has changed, and what its client was told.
//
// Methods that use the engine return the fields of an error, or null.
import {
  State,
  applyState,
  captureState,
  expectReported,
  readReported,
  readTimeouts,
  startSql,
} from './settings.mjs'
import { EFFECT } from './sql.mjs'

// Settings of every client library: they may be believed before the engine has seen them.
const HARMLESS = new Set(['application_name', 'client_encoding'])

export class SessionSettings {
  #engine
  #catalog
  #onChange
  // Who it is and what it asks for, see startSql(); and the same as a key to `catalog.startups`.
  #start
  #startKey
  // The engine has accepted the start, and `#state` is what it has made of it since.
  #proven = false
  #state = null
  #startValues = new Map()
  // Settings with a dot in their name, which the engine does not list; and what looks like one.
  #customNames = new Set()
  // What the current transaction may have changed, see EFFECT; and what was reported and obeyed
  // before it did, to go back to when it has changed that for itself only.
  #effects = 0
  #outside = null

  reported = new Map()
  // Milliseconds, 0 for none.
  timeouts = { statementMs: 0, idleMs: 0 }

  // onChange(name, value) is called for what the client must be told.
  constructor({ engine, catalog, user, database, requested, onChange }) {
    this.#engine = engine
    this.#catalog = catalog
    this.#onChange = onChange
    const { superuser } = catalog.roles.get(user)
    const administered = catalog.administeredSettings(user, database)
    this.#start = { user, superuser, administered, requested }
    this.#startKey = JSON.stringify([database, user, [...administered], [...requested]])
    this.#adoptProvenStart()
  }

  // ---- the start

  // Whether the engine must be asked before the client can be told that it may begin.
  get mustBeProven() {
    if (this.#proven) return false
    return ![...this.#start.requested.keys()].every((name) => HARMLESS.has(name))
  }

  // A session that starts as another has started needs nothing from the engine.
  #adoptProvenStart() {
    const proven = this.#catalog.startups.get(this.#startKey)
    if (proven === undefined) return false
    this.#proven = true
    this.#state = proven.state
    this.#startValues = proven.state.values
    this.#customNames = new Set(proven.customNames)
    this.timeouts = proven.timeouts
    this.#report(proven.reported)
    return true
  }

  // To be told to a client whose start the engine has not seen yet.
  expect() {
    if (this.#proven) return
    const { reported, timeouts } = expectReported(this.#catalog.defaults, this.#start)
    this.timeouts = timeouts
    this.#report(reported)
  }

  async prove() {
    if (this.#proven || this.#adoptProvenStart()) return null
    this.#engine.stateKey = null
    const { error } = await this.#engine.query(startSql(this.#start))
    if (error) return error
    for (const name of [...this.#start.requested.keys(), ...this.#start.administered.keys()]) {
      if (name.includes('.')) this.#customNames.add(name)
    }
    const refused = await this.#capture()
    if (refused) return refused
    this.#proven = true
    this.#startValues = this.#state.values
    this.#catalog.startups.set(this.#startKey, {
      state: this.#state,
      customNames: new Set(this.#customNames),
      timeouts: this.timeouts,
      reported: new Map(this.reported),
    })
    return null
  }

  // ---- turns

  // Brings the engine into this session's state.
  async takeOver() {
    if (!this.#proven) {
      const error = await this.prove()
      if (error) return error
    }
    return applyState(this.#engine, this.#state)
  }

  // Notes what a group that is about to run may change.
  expectChanges(group) {
    this.#effects |= group.effects
    for (const name of group.settingNames) this.#customNames.add(name.toLowerCase())
  }

  // Whether something must be looked into before the client may go on.
  get mayHaveChanged() {
    return this.#effects !== 0
  }

  // Looks into it: to be called when the engine is ready for the next statement.
  async follow(status, group, { discardedAll }) {
    if (status === 'I') return this.#followTransaction(discardedAll)
    const isTold = group.effects & EFFECT.reported
    const isObeyed = group.effects & EFFECT.timeouts
    if (status !== 'T' || !(isTold || isObeyed)) return null
    this.#outside ??= { timeouts: this.timeouts, reported: new Map(this.reported) }
    return isTold ? this.#readReported() : this.#readTimeouts()
  }

  async #followTransaction(discardedAll) {
    const effects = this.#effects
    let error = null
    if (discardedAll) error = await this.#restart()
    else if (effects & EFFECT.settings) error = await this.#capture()
    else this.#goBack()
    this.#effects = 0
    this.#outside = null
    if (!error && effects & EFFECT.catalog) error = await this.#catalog.load(this.#engine)
    return error
  }

  // The engine has ended: what the transaction had changed is as it was before.
  forgetChanges() {
    this.#goBack()
    this.#effects = 0
    this.#outside = null
  }

  #goBack() {
    if (this.#outside === null) return
    this.timeouts = this.#outside.timeouts
    this.#report(this.#outside.reported)
  }

  // ---- the engine's side

  // Remembers what this session has changed, so that it can be put back after others have run.
  async #capture() {
    const { state, error } = await captureState(this.#engine, this.#customNames)
    if (error) return error
    if (state.user !== this.#start.user && !this.#start.superuser) {
      this.#engine.stateKey = null
      return { C: '42501', M: 'the session authorization was changed' }
    }
    this.#engine.stateKey = state.key
    // Many of them were only names of tables.
    for (const name of this.#customNames) {
      if (!state.values.has(name)) this.#customNames.delete(name)
    }
    // What was reset fell back to the engine's command line: put it back to how it started.
    const lost = [...this.#startValues].filter(([name]) => !state.values.has(name))
    const values = new Map([...state.values, ...lost])
    this.#state = lost.length > 0 ? new State({ ...state, values }) : state
    return (await applyState(this.#engine, this.#state)) ?? this.#readReported()
  }

  async #restart() {
    this.#engine.stateKey = null
    this.#state = new State({ values: this.#startValues, user: this.#start.user })
    return (await applyState(this.#engine, this.#state)) ?? this.#readReported()
  }

  async #readReported() {
    const { reported, timeouts, error } = await readReported(this.#engine)
    if (error) return error
    this.timeouts = timeouts
    this.#report(reported)
    return null
  }

  async #readTimeouts() {
    const { timeouts, error } = await readTimeouts(this.#engine)
    if (error) return error
    this.timeouts = timeouts
    return null
  }

  #report(reported) {
    for (const [name, value] of reported) {
      if (this.reported.get(name) === value) continue
      this.reported.set(name, value)
      this.#onChange(name, value)
    }
  }
}
