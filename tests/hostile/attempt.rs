//! One attempt: what a user does with an image, on a damaged one, and the rules that must hold all the way.

use std::ops::Range;
use std::sync::Arc;

use qcow2::error::{Corruption, CorruptionKind, Error, IoOp};
use qcow2::format::GuestOffset;
use qcow2::image::{Image, OpenOptions, ZeroFlags};
use qcow2::storage::Storage;
use qcow2::storage::memory::MemoryStorage;

use crate::damage::{Damage, Part, Reach, Site, reach};
use crate::fixture::Fixture;
use crate::guarded::Guarded;

type Outcome = Result<&'static str, String>;

/// Corruption that describes no guest cluster.
const REFCOUNT_TABLE: [CorruptionKind; 2] =
    [CorruptionKind::RefcountTableEntry, CorruptionKind::RefcountBlockBeyondEof];

/// Most extents that are listed of a damaged image.
const EXTENTS_MAX: usize = 2000;

macro_rules! rule {
    ($holds:expr, $($broken:tt)+) => {
        if !$holds {
            return Err(format!($($broken)+));
        }
    };
}

/// An open damaged image, and what the guest should see.
struct Attempt<'a> {
    image: Image,
    site: &'a Site,
    /// Layers from the top to the damaged one.
    depth: u32,
    expected: Vec<u8>,
    unknown: Vec<Range<u64>>,
    reach: Reach,
    wrote: bool,
    /// The first word of the site, as it is now.
    word: u64,
    cluster: u64,
    found: Option<Corruption>,
}

fn options(read_only: bool, backing: Vec<Arc<dyn Storage>>) -> OpenOptions {
    OpenOptions {
        read_only,
        backing_storages: backing,
        l2_cache_size: 128 << 10,
        refcount_cache_size: 128 << 10,
        ..OpenOptions::default()
    }
}

/// Damages the image that is opened.
pub fn on_image(fixture: &Fixture, site: &Site, damage: Damage) -> Outcome {
    let damaged = damage.apply(&fixture.bytes, site);
    let storage = Arc::new(Guarded::new(damaged.clone()));
    let backing = || -> Vec<Arc<dyn Storage>> {
        fixture.raw_backing.iter().map(|b| Arc::new(MemoryStorage::new(b.clone())) as Arc<dyn Storage>).collect()
    };
    let image = match Image::open_storage(storage.clone(), &options(false, backing())) {
        Ok(image) => image,
        Err(e) => {
            let unchanged = storage.changes() == 0 && storage.bytes() == damaged;
            rule!(unchanged || e == Error::NeedsRepair, "refused ({e}), but written to");
            let kind = if refuses_only_writes(&e) { "read-only" } else { return Ok("refused") };
            read_only(fixture, site, &damaged, storage, backing())?;
            return Ok(kind);
        }
    };
    rule!(storage.changes() == 0 || is_dirty(&damaged), "opening wrote");
    let mut attempt = Attempt::new(fixture, site, &damaged, image, 0);
    attempt.read_all()?;
    attempt.map_all()?;
    if attempt.found.is_none() {
        attempt.write_some(&spots(fixture))?;
    }
    let marked = attempt.check_marked(&storage.bytes())?;
    attempt.note(attempt.image.close())?;
    let marked = marked || attempt.check_marked(&storage.bytes())?;
    let (unknown, expected) = (std::mem::take(&mut attempt.unknown), std::mem::take(&mut attempt.expected));
    let reach = Reach { reads: std::mem::take(&mut attempt.reach.writes), writes: Vec::new() };
    let (found, word) = (attempt.found, attempt.word);
    drop(attempt);
    let before = storage.changes();
    let reopened = Image::open_storage(storage.clone(), &options(true, backing()));
    match reopened {
        Ok(image) => {
            let (depth, wrote, cluster) = (0, true, fixture.cluster);
            let mut again = Attempt { image, site, depth, expected, unknown, reach, wrote, word, cluster, found: None };
            again.reach.writes.clone_from(&again.reach.reads);
            again.read_all()?;
            again.map_all()?;
            again.note(again.image.close())?;
        }
        Err(e) => rule!(reach.reads.iter().any(|r| r.end == u64::MAX), "cannot be opened again: {e}"),
    }
    rule!(storage.changes() == before, "a read-only handle wrote");
    Ok(match found {
        Some(_) if marked => "corrupt",
        Some(_) => "corrupt, version 2",
        None => "went on",
    })
}

/// An open for writing repairs such an image.
fn is_dirty(bytes: &[u8]) -> bool {
    bytes[7] == 3 && bytes[79] & 1 == 1
}

fn refuses_only_writes(e: &Error) -> bool {
    matches!(e, Error::MarkedCorrupt | Error::NeedsRepair)
}

fn read_only(
    fixture: &Fixture,
    site: &Site,
    damaged: &[u8],
    storage: Arc<Guarded>,
    backing: Vec<Arc<dyn Storage>>,
) -> Result<(), String> {
    let before = storage.changes();
    let image = Image::open_storage(storage.clone(), &options(true, backing))
        .map_err(|e| format!("is not to be written, and cannot be opened read-only: {e}"))?;
    let mut attempt = Attempt::new(fixture, site, damaged, image, 0);
    attempt.read_all()?;
    attempt.map_all()?;
    rule!(attempt.image.pwrite(&[0], 0).is_err(), "a read-only handle took a write");
    attempt.note(attempt.image.close())?;
    rule!(storage.changes() == before, "a read-only handle wrote");
    Ok(())
}

/// Damages the backing file of the image that is opened.
pub fn on_backing(overlay: &Fixture, base: &Fixture, site: &Site, damage: Damage) -> Outcome {
    let damaged = damage.apply(&base.bytes, site);
    let below = Arc::new(Guarded::new(damaged.clone()));
    let storage = Arc::new(Guarded::new(overlay.bytes.clone()));
    let image = match Image::open_storage(storage.clone(), &options(false, vec![below.clone()])) {
        Ok(image) => image,
        Err(e) => {
            let named = matches!(e, Error::Backing { .. } | Error::BackingFormat { .. } | Error::BackingDenied { .. });
            rule!(named, "does not name the backing file: {e:?}");
            rule!(storage.changes() + below.changes() == 0, "refused ({e}), but written to");
            return Ok("refused");
        }
    };
    let mut attempt = Attempt::new(base, site, &damaged, image, 1);
    attempt.expected.clone_from(&overlay.expected);
    attempt.reach.writes.clone_from(&attempt.reach.reads); // nobody writes there
    attempt.read_all()?;
    attempt.map_all()?;
    attempt.write_some(&spots(base))?;
    attempt.read_all()?;
    rule!(storage.bytes()[79] & 2 == 0 && !attempt.image.info().corrupt, "the overlay is marked corrupt");
    let closed = attempt.image.close();
    rule!(closed.is_ok(), "close: {closed:?}");
    rule!(below.changes() == 0 && below.bytes() == damaged, "the backing file was written");
    Ok(if attempt.found.is_some() { "backing file corrupt" } else { "went on" })
}

/// Where to write: unaligned, across clusters of different kinds, and the last bytes of the disk.
fn spots(fixture: &Fixture) -> Vec<Range<u64>> {
    let (unit, size) = (fixture.cluster, fixture.expected.len() as u64);
    vec![
        unit - 100..unit + 211,         // data, ours and not
        2 * unit + 5..2 * unit + 77,    // inside a compressed cluster
        4 * unit - 3..5 * unit + 17,    // end of a compressed, all of a zero cluster, start of an unallocated one
        7 * unit..8 * unit,             // a whole cluster
        9 * unit + 512..9 * unit + 515, // nothing was there
        size - 7..size,
    ]
}

impl<'a> Attempt<'a> {
    fn new(fixture: &Fixture, site: &'a Site, damaged: &[u8], image: Image, depth: u32) -> Self {
        // Of the damaged image: its header tells what the damage reaches.
        let first = &damaged[..damaged.len().min(2 << 20)];
        let reach = match qcow2::format::Header::parse(first) {
            Ok(header) => reach(fixture, site, damaged, &header, &spots(fixture)),
            Err(e) => panic!("opened in spite of {e}"),
        };
        let expected = fixture.expected.clone();
        let word = damaged[site.bytes.start..].iter().take(8).fold(0, |word, byte| word << 8 | u64::from(*byte));
        Self {
            image,
            site,
            depth,
            expected,
            unknown: Vec::new(),
            reach,
            wrote: false,
            word,
            cluster: fixture.cluster,
            found: None,
        }
    }

    fn in_reach(&self, range: &Range<u64>) -> bool {
        self.reach.reads.iter().chain(&self.unknown).any(|r| r.start < range.end && range.start < r.end)
    }

    /// Looks at a result: the errors that damage may cause, and no others.
    fn note(&mut self, result: Result<(), Error>) -> Result<bool, String> {
        let Err(e) = result else { return Ok(true) };
        let text = e.to_string();
        let own = match &e {
            Error::Backing { source, .. } if self.depth > 0 => source,
            e => e,
        };
        match own {
            Error::Corrupt(found) => {
                rule!((self.depth > 0) == matches!(e, Error::Backing { .. }), "whose corruption is it? {e:?}");
                rule!(text.contains(&format!("0x{:x}", found.host_offset)), "the place is not named: {text}");
                self.check_place(found)?;
                self.found.get_or_insert(*found);
            }
            Error::MarkedCorrupt => rule!(self.found.is_some(), "marked corrupt, but nothing was found"),
            Error::Io { op: IoOp::Write, errno: libc::EFBIG, .. } | Error::TooLarge { .. } => {}
            Error::OutOfRange { .. } if self.site.part == Part::Header => {}
            e => return Err(format!("unexpected error {e:?}")),
        }
        Ok(false)
    }

    /// Corruption is reported where it is, as far as that is for one structure to say.
    fn check_place(&self, found: &Corruption) -> Result<(), String> {
        let at = self.site.bytes.start as u64;
        let inside = |start: u64, length: u64| (start..start + length).contains(&found.host_offset);
        let in_counts = matches!(found.kind, CorruptionKind::RefcountUnderflow | CorruptionKind::MetadataCountedFree);
        let of_stored = matches!(found.kind, CorruptionKind::CompressedData | CorruptionKind::CompressedBeyondEof);
        let table = self.word & 0x00ff_ffff_ffff_fe00;
        let placed = match self.site.part {
            Part::Header => true,
            Part::L2 => found.host_offset == at || of_stored,
            // Where it points to something else, that is what turns out to be no L2 table.
            Part::L1 => found.host_offset == at || table != 0 && (inside(table, self.cluster) || of_stored),
            Part::RefcountTable => found.host_offset == at || in_counts && inside(self.word, self.cluster),
            Part::RefcountBlock => inside(at, 8),
            Part::Compressed => of_stored && found.host_offset <= at,
        };
        let spread = self.wrote && self.reach.writes.iter().any(|r| r.end == u64::MAX);
        rule!(placed || spread, "reported in another place: {found:?}");
        rule!(found.guest_offset.is_some() != (in_counts || REFCOUNT_TABLE.contains(&found.kind)), "{found:?}");
        Ok(())
    }

    /// Reads all of the disk, piece by piece: an error in one piece is no excuse for the next.
    fn read_all(&mut self) -> Result<(), String> {
        let size = self.image.size().min(self.expected.len() as u64);
        let step = self.cluster.max(4096);
        let mut piece = vec![0; step as usize];
        for start in (0..size).step_by(step as usize) {
            let range = start..size.min(start + step);
            let piece = &mut piece[..(range.end - start) as usize];
            let result = self.image.pread(piece, start);
            let failed = result.as_ref().err().map(ToString::to_string);
            let read = self.note(result)?;
            rule!(read || self.in_reach(&range), "reading {range:?}: {}", failed.unwrap_or_default());
            if read && *piece != self.expected[start as usize..range.end as usize] {
                self.compare(piece, start)?;
            }
        }
        Ok(())
    }

    fn compare(&self, piece: &[u8], start: u64) -> Result<(), String> {
        for (i, byte) in piece.iter().enumerate() {
            let at = start + i as u64;
            let expected = self.expected[at as usize];
            rule!(*byte == expected || self.in_reach(&(at..at + 1)), "guest byte {at} reads {byte}, not {expected}");
        }
        Ok(())
    }

    fn map_all(&mut self) -> Result<(), String> {
        let (mut at, size) = (0, self.image.size());
        for _ in 0..EXTENTS_MAX {
            if at >= size {
                break;
            }
            match self.image.map(GuestOffset(at), size - at) {
                Ok(extent) => {
                    rule!(extent.start.0 == at && extent.length > 0 && extent.length <= size - at, "{extent:?}");
                    at += extent.length;
                }
                Err(e) => {
                    self.note(Err(e))?;
                    at = (at + 512) & !511;
                }
            }
        }
        Ok(())
    }

    fn write_some(&mut self, spots: &[Range<u64>]) -> Result<(), String> {
        let size = self.image.size();
        self.wrote = true;
        for (i, spot) in spots.iter().enumerate().filter(|(_, spot)| spot.end <= size) {
            let payload = vec![0xa0 + i as u8; (spot.end - spot.start) as usize];
            let result = self.image.pwrite(&payload, spot.start);
            if !matches!(result, Err(Error::MarkedCorrupt)) && result.is_err() {
                self.unknown.push(spot.clone()); // old or new
            }
            if self.note(result)? {
                self.expected[spot.start as usize..spot.end as usize].copy_from_slice(&payload);
                let mut seen = vec![0; payload.len()];
                let read = self.image.pread(&mut seen, spot.start);
                let wild = self.reach.writes.iter().any(|r| r.start < spot.end && spot.start < r.end);
                rule!(self.note(read)? && seen == payload || wild, "does not read back what was written: {spot:?}");
            }
            if i == 2 {
                self.note(self.image.flush())?;
            }
        }
        self.zero_and_discard(spots[3].clone(), spots[4].start - 512..spots[4].end)?;
        self.note(self.image.flush())?;
        let reads = std::mem::replace(&mut self.reach.reads, self.reach.writes.clone());
        self.read_all()?;
        self.reach.reads = reads;
        Ok(())
    }

    /// Zeroes over some clusters, and then a whole one given up.
    fn zero_and_discard(&mut self, whole: Range<u64>, zeroes: Range<u64>) -> Result<(), String> {
        let zeroed = self.image.write_zeroes(zeroes.start, zeroes.end - zeroes.start, ZeroFlags::default());
        let discarded = self.image.discard(whole.start, whole.end - whole.start);
        for (range, result) in [(zeroes, zeroed), (whole, discarded)] {
            if !matches!(result, Err(Error::MarkedCorrupt)) && result.is_err() {
                self.unknown.push(range.clone());
            }
            if self.note(result)? {
                self.expected[range.start as usize..range.end as usize].fill(0);
            }
        }
        Ok(())
    }

    /// Corruption that was found is on record, in the image and in the handle. Version 2 has no place for it.
    fn check_marked(&mut self, bytes: &[u8]) -> Result<bool, String> {
        let Some(found) = self.found else { return Ok(false) };
        rule!(self.image.info().corrupt, "the handle does not say that it is corrupt: {found}");
        let write = self.image.pwrite(&[1], 0);
        let refused = match &write {
            Err(Error::MarkedCorrupt) => true,
            Err(Error::Argument { .. }) => true, // closed
            _ => false,
        };
        rule!(refused, "found {found}, but a write gives {write:?}");
        let marked = bytes[79] & 2 != 0;
        rule!(self.image.header().geometry.version < 3 || marked, "found {found}, but the image is not marked");
        Ok(marked)
    }
}
