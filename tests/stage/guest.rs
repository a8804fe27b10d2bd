//! What a guest may read: for each sector, the value that is stable and the values issued since.

use std::collections::BTreeMap;
use std::rc::Rc;

use qcow2::storage::sim::SECTOR_BYTES;

/// The bytes that operation `op` writes to `[offset, offset + length)`: each sector names the operation and itself.
pub fn pattern(op: u64, offset: u64, length: u64) -> Vec<u8> {
    let first = offset / SECTOR_BYTES as u64;
    let last = (offset + length).div_ceil(SECTOR_BYTES as u64);
    let mut bytes = Vec::with_capacity(((last - first) as usize) * SECTOR_BYTES);
    for sector in first..last {
        bytes.extend_from_slice(b"guest:op");
        bytes.extend_from_slice(&op.to_be_bytes());
        bytes.extend_from_slice(&sector.to_be_bytes());
        let mut word = op.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sector.wrapping_mul(0xc2b2_ae3d_27d4_eb4f) | 1;
        for _ in 3..SECTOR_BYTES / 8 {
            word = word.rotate_left(13).wrapping_mul(0x9fb2_1c65_1e98_df25);
            bytes.extend_from_slice(&word.to_be_bytes());
        }
    }
    let from = (offset - first * SECTOR_BYTES as u64) as usize;
    bytes.drain(..from);
    bytes.truncate(length as usize);
    bytes
}

/// As [`pattern`], and compressible, to a size that depends on the operation.
pub fn squeezable(op: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = pattern(op, offset, length);
    let kept = 32 + (op.wrapping_mul(7) % 50) as usize * 8;
    for (index, byte) in bytes.iter_mut().enumerate() {
        if (offset as usize + index) % SECTOR_BYTES >= kept {
            *byte = op as u8 | 1;
        }
    }
    bytes
}

/// What stands for a sector past the end of the disk, which a guest cannot read.
pub const PAST_THE_END: [u8; SECTOR_BYTES] = [0xee; SECTOR_BYTES];

/// A name for what a sector holds, for messages.
pub fn content_of(bytes: &[u8; SECTOR_BYTES]) -> String {
    if bytes.starts_with(b"guest:op") {
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        return format!("[op {} of sector {}]", word(8), word(16));
    }
    if *bytes == PAST_THE_END {
        return "[past the end]".into();
    }
    if bytes.iter().all(|b| *b == bytes[0]) {
        return format!("[all 0x{:02x}]", bytes[0]);
    }
    format!("[{:02x?}..]", &bytes[..8])
}

#[derive(Debug, Clone)]
struct Version {
    content: Rc<[u8; SECTOR_BYTES]>,
    id: u64,
    completed: Option<u64>,
}

/// The oracle. Time is a counter that moves at each call.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Oldest first: the stable value, and what was issued since.
    sectors: BTreeMap<u64, Vec<Version>>,
    now: u64,
}

/// A write that was issued.
#[derive(Debug, Clone)]
pub struct Ticket {
    id: u64,
    sectors: std::ops::Range<u64>,
}

impl Guest {
    /// A guest with stable contents.
    pub fn new(initial: impl IntoIterator<Item = (u64, Rc<[u8; SECTOR_BYTES]>)>) -> Self {
        let stable = |content| vec![Version { content, id: 0, completed: Some(0) }];
        Self { sectors: initial.into_iter().map(|(sector, content)| (sector, stable(content))).collect(), now: 0 }
    }

    /// The sectors that it knows.
    pub fn sectors(&self) -> impl Iterator<Item = u64> + '_ {
        self.sectors.keys().copied()
    }

    /// The sectors that have unflushed values, and every `n`th of the others, starting at a different one for each
    /// `phase`: what is damaged is rarely one sector alone, and never in one crash state alone.
    pub fn sample(&self, phase: u64, n: u64) -> impl Iterator<Item = u64> + '_ {
        let wanted = move |(sector, versions): (&u64, &Vec<Version>)| {
            (versions.len() > 1 || (sector + phase).is_multiple_of(n)).then_some(*sector)
        };
        self.sectors.iter().filter_map(wanted)
    }

    /// The present time.
    pub fn now(&self) -> u64 {
        self.now + 1
    }

    /// The newest value of a sector.
    pub fn latest(&self, sector: u64) -> &[u8; SECTOR_BYTES] {
        &self.sectors[&sector].last().unwrap().content
    }

    /// All that a sector may read.
    pub fn possible(&self, sector: u64) -> impl Iterator<Item = Rc<[u8; SECTOR_BYTES]>> + '_ {
        self.sectors[&sector].iter().map(|version| version.content.clone())
    }

    /// A write is about to be sent. Bytes of a sector that it does not cover stay as in the newest value.
    pub fn issue(&mut self, offset: u64, data: &[u8]) -> Ticket {
        self.now += 1;
        let size = SECTOR_BYTES as u64;
        let sectors = offset / size..(offset + data.len() as u64).div_ceil(size);
        for sector in sectors.clone() {
            let versions = self.sectors.get_mut(&sector).expect("writes go to known sectors");
            let mut content = *versions.last().unwrap().content;
            let (from, to) = (offset.max(sector * size), (offset + data.len() as u64).min((sector + 1) * size));
            let part = &data[(from - offset) as usize..(to - offset) as usize];
            content[(from - sector * size) as usize..][..part.len()].copy_from_slice(part);
            versions.push(Version { content: Rc::new(content), id: self.now, completed: None });
        }
        Ticket { id: self.now, sectors }
    }

    /// The end of the disk is about to move from one sector to another. What is past it is no sector of the disk; what
    /// comes back reads as zeroes.
    pub fn issue_end(&mut self, old: u64, new: u64) -> Ticket {
        self.now += 1;
        let content = Rc::new(if new < old { PAST_THE_END } else { [0; SECTOR_BYTES] });
        let sectors = old.min(new)..old.max(new);
        for (_, versions) in self.sectors.range_mut(sectors.clone()) {
            versions.push(Version { content: content.clone(), id: self.now, completed: None });
        }
        Ticket { id: self.now, sectors }
    }

    /// What was issued was refused, and must have had no effect.
    pub fn retract(&mut self, ticket: &Ticket) {
        for (_, versions) in self.sectors.range_mut(ticket.sectors.clone()) {
            versions.retain(|version| version.id != ticket.id);
        }
    }

    /// The write has been acknowledged.
    pub fn complete(&mut self, ticket: &Ticket) {
        self.now += 1;
        for (_, versions) in self.sectors.range_mut(ticket.sectors.clone()) {
            for version in versions {
                if version.id == ticket.id {
                    version.completed = Some(self.now);
                }
            }
        }
    }

    /// A flush that began at `started` has been acknowledged: what had completed before it is stable.
    pub fn flushed(&mut self, started: u64) {
        self.now += 1;
        for versions in self.sectors.values_mut().filter(|v| v.len() > 1) {
            let stable = versions.iter().rposition(|v| v.completed.is_some_and(|at| at < started));
            versions.drain(..stable.unwrap_or(0));
        }
    }

    /// A write with FUA has been acknowledged: it is stable.
    pub fn forced(&mut self, ticket: &Ticket) {
        self.complete(ticket);
        for (_, versions) in self.sectors.range_mut(ticket.sectors.clone()) {
            let stable = versions.iter().position(|v| v.id == ticket.id);
            versions.drain(..stable.unwrap_or(0));
        }
    }

    /// The value is known now.
    pub fn settle(&mut self, sector: u64, content: &[u8; SECTOR_BYTES]) {
        let version = Version { content: Rc::new(*content), id: 0, completed: Some(0) };
        self.sectors.insert(sector, vec![version]);
    }

    /// D7 and D8: a sector that nothing touched reads its stable value; another one that, or one issued since.
    pub fn judge(&self, sector: u64, found: &[u8; SECTOR_BYTES]) -> Result<(), String> {
        let versions = &self.sectors[&sector];
        if versions.iter().rev().any(|v| *v.content == *found) {
            return Ok(());
        }
        let (stable, is) = (content_of(&versions[0].content), content_of(found));
        if versions.len() == 1 {
            return Err(format!("D7: guest sector {sector} is stable as {stable} and reads {is}"));
        }
        let issued: Vec<String> = versions[1..].iter().map(|v| content_of(&v.content)).collect();
        Err(format!("D8: guest sector {sector} was {stable}, then {issued:?}, and reads {is}"))
    }
}
