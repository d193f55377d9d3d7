// Puts a cluster into a new data folder, wholly or not at all.
//
// It is a copy of one that was made when the engine was installed: making one takes seconds.
import fs from 'node:fs'
import path from 'node:path'

const UNFINISHED = '.new'

// Returns whether the folder had none. The copy is made beside its place and moved there when it
// is complete and on disk: a start that is interrupted leaves nothing that a later one would trust.
export function prepareCluster({ template, dataDir, fsync }) {
  if (fs.existsSync(path.join(dataDir, 'PG_VERSION'))) return false
  // An empty folder may be replaced; one with something in it is not ours to judge.
  if (fs.existsSync(dataDir) && fs.readdirSync(dataDir).length > 0) {
    throw new Error(`${dataDir} is not empty and is not a database cluster`)
  }
  const unfinished = dataDir + UNFINISHED
  fs.rmSync(unfinished, { recursive: true, force: true })
  fs.cpSync(template, unfinished, { recursive: true, mode: fs.constants.COPYFILE_FICLONE })
  fs.chmodSync(unfinished, 0o700)
  if (fsync) syncTree(unfinished)
  fs.renameSync(unfinished, dataDir)
  if (fsync) syncPath(path.dirname(dataDir))
  return true
}

function syncTree(directory) {
  for (const entry of fs.readdirSync(directory, { withFileTypes: true })) {
    const child = path.join(directory, entry.name)
    if (entry.isDirectory()) syncTree(child)
    else if (entry.isFile()) syncPath(child)
  }
  syncPath(directory)
}

function syncPath(name) {
  const file = fs.openSync(name, 'r')
  try {
    fs.fsyncSync(file)
  } finally {
    fs.closeSync(file)
  }
}
