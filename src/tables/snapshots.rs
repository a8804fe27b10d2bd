//! The snapshot table of an image, whole in memory while it is worked with. It is read when it is asked for: what is
//! wrong with it is no reason to refuse the disk.

use std::ops::Range;

use super::file::HostFile;
use crate::error::{Error, Result};
use crate::format::snapshot::{ENTRY_BYTES_MIN, Parsed, TABLE_BYTES_MAX, encode_table};
use crate::format::{Geometry, HostOffset, Snapshot};
use crate::storage::{Io, IoDst};

/// What is read at a time.
const WINDOW_BYTES: usize = 64 << 10;

/// A snapshot table, as it is in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotTable {
    /// Where it is.
    pub offset: HostOffset,
    /// Its length there, with the padding of the last entry.
    pub bytes: u64,
    /// Its entries.
    pub snapshots: Vec<Snapshot>,
}

impl SnapshotTable {
    /// Reads the table of `count` entries at `offset`.
    pub async fn load<I: Io>(io: &I, file: &HostFile, offset: HostOffset, count: u32) -> Result<Self> {
        let mut table = Self { offset, bytes: 0, snapshots: Vec::new() };
        let mut window = Vec::new();
        let (mut at, mut is_whole) = (0, false); // within the window; whether it reaches the end of the file
        for entry in 0..count {
            let mut want = ENTRY_BYTES_MIN;
            loop {
                let rest: &[u8] = window.get(at..).unwrap_or_default();
                if rest.len() < want && !is_whole {
                    let place = offset.plus(table.bytes);
                    window = read_window(io, file, place, want.max(WINDOW_BYTES)).await?;
                    is_whole = window.len() < want.max(WINDOW_BYTES);
                    at = 0;
                    continue;
                }
                match Snapshot::parse(rest, entry)? {
                    Parsed::Entry(snapshot, next) => {
                        table.snapshots.push(snapshot);
                        table.bytes += next as u64;
                        at += next;
                        break;
                    }
                    Parsed::Short(_) if is_whole => return Err(outside(entry, offset.plus(table.bytes).0)),
                    Parsed::Short(more) => want = more,
                }
            }
            if table.bytes > TABLE_BYTES_MAX {
                return Err(Error::TooLarge { what: "the snapshot table", limit: TABLE_BYTES_MAX });
            }
        }
        Ok(table)
    }

    /// The entries as they are written.
    pub fn encode(&self) -> Result<Vec<u8>> {
        encode_table(&self.snapshots)
    }

    /// The host clusters that it occupies.
    pub fn clusters(&self, geometry: Geometry) -> Range<u64> {
        let first = geometry.host_cluster(self.offset).0;
        first..first + geometry.clusters_for(self.bytes)
    }
}

fn outside(entry: u32, place: u64) -> Error {
    Error::SnapshotTable { entry, field: "offset", value: place, expected: "an entry that ends inside the file" }
}

/// Up to `length` bytes; fewer where the file ends.
async fn read_window<I: Io>(io: &I, file: &HostFile, at: HostOffset, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let got = file.read(io, &[IoDst::from(&mut bytes[..])], at).await?;
    bytes.truncate(got);
    Ok(bytes)
}
