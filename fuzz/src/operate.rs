//! Operations on an image. On a sound one they do what a model of the disk does, and leave nothing for a check to
//! complain about; on a damaged one they never write to the header or to tables as if these were data.

use std::sync::Arc;

use qcow2::error::Error;
use qcow2::format::{GuestOffset, Header};
use qcow2::image::bitmaps::BitmapOptions;
use qcow2::image::check::{CheckOptions, check_with};
use qcow2::image::options::{DetectZeroes, Discard, OverlapCheck, Preallocation};
use qcow2::image::resize::ResizeOptions;
use qcow2::image::{OpenOptions, SnapshotFacts, WriteFlags, ZeroFlags};
use qcow2::storage::{Blocking, IoSrc, Storage};
use qcow2::wait::block_on;
use qcow2::{Image, Result};

use crate::bytes::Bytes;
use crate::disk::Disk;
use crate::heap::limited;
use crate::images::open_options;
use crate::rule;
use crate::subject::Subject;

/// Memory of one input. A resize to the largest disk makes a new L1 table of 32 MiB, in memory and as it is stored.
const HEAP_MAX: usize = 160 << 20;
/// Operations of one input.
const OPERATIONS_MAX: usize = 60;
/// Longest write, and largest disk of the model.
const LENGTH_MAX: u64 = 200 << 10;
const MODEL_MAX: u64 = 2 << 20;
/// Every byte that is written; no structure holds eight of them in a row.
const MARK: u8 = 0xd7;

/// Runs the operations.
pub fn operate(input: &[u8]) {
    let mut input = Bytes::new(input);
    let subject = Subject::take(&mut input);
    limited(HEAP_MAX, || run(&subject, &mut input));
}

struct Run<'a> {
    image: Image,
    subject: &'a Subject,
    /// What the guest should see, for a sound image.
    model: Option<Vec<u8>>,
    /// What the snapshots that were taken here hold.
    taken: Vec<(String, Vec<u8>)>,
    bitmaps: u32,
    ignores_discard: bool,
    failed: bool,
}

fn run(subject: &Subject, input: &mut Bytes<'_>) {
    let disk = Arc::new(Disk::new(subject.bytes.clone()));
    let mut options = open_options(subject.seed);
    let how = input.u8();
    options.detect_zeroes = [DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap][how as usize % 3];
    if how & 0x40 == 0x40 && options.detect_zeroes != DetectZeroes::Unmap {
        options.discard = Discard::Ignore;
    }
    options.overlap_check =
        [OverlapCheck::Constant, OverlapCheck::All, OverlapCheck::Cached, OverlapCheck::None][how as usize >> 3 & 3];
    options.cache.write_through = how & 0x80 == 0x80;
    let image = match Image::open_storage(disk.clone(), &options) {
        Ok(image) => image,
        Err(e) => {
            rule!(!subject.is_sound, "a sound image is refused: {e}");
            let unchanged = disk.changes() == 0 || e == Error::NeedsRepair || is_dirty(&subject.bytes);
            rule!(unchanged, "refused ({e}), but written to");
            return;
        }
    };
    let model = subject.is_sound.then(|| subject.seed.content.clone());
    let ignores_discard = options.discard == Discard::Ignore;
    let (taken, bitmaps, failed) = (Vec::new(), 0, false);
    let mut run = Run { image, subject, model, taken, bitmaps, ignores_discard, failed };
    for _ in 0..OPERATIONS_MAX {
        if input.is_empty() {
            break;
        }
        run.step(input);
    }
    run.compare();
    let closed = run.image.close();
    run.note("close", closed);
    let failed = run.failed;
    drop(run.image);
    if options.overlap_check != OverlapCheck::None {
        header_is_no_data(subject, &disk.bytes());
    }
    if subject.is_sound && !failed {
        let storage = Arc::clone(&disk) as Arc<dyn Storage>;
        let mut options = CheckOptions { memory_bytes: 1 << 20, ..CheckOptions::default() };
        let checked = block_on(check_with(&Blocking, storage, "image", &OpenOptions::default(), &mut options));
        let is_clean = checked.as_ref().is_ok_and(|result| result.is_sound() && result.leaks == 0);
        rule!(is_clean, "{}: after these operations: {checked:?}", subject.seed.name);
    }
}

fn is_dirty(bytes: &[u8]) -> bool {
    bytes.len() > 79 && bytes[7] == 3 && bytes[79] & 1 == 1
}

/// Whatever entries say, guest data does not get into the header.
fn header_is_no_data(subject: &Subject, bytes: &[u8]) {
    let was = Header::parse(&subject.bytes[..subject.bytes.len().min(2 << 20)]);
    let now = Header::parse(&bytes[..bytes.len().min(2 << 20)]);
    rule!(was.is_err() || now.is_ok(), "the header is no header any more: {:?}", now.err());
    rule!(!bytes[..bytes.len().min(104)].windows(8).any(|word| word == [MARK; 8]), "guest data in the header");
}

impl Run<'_> {
    /// Looks at a result. Of a sound image only a full disk, and what says that it is refused, may fail.
    fn note(&mut self, what: &str, result: Result<()>) -> bool {
        crate::trace!("{what}: {result:?}, {} bytes held at most so far", crate::heap::peak());
        let Err(e) = result else { return true };
        if matches!(e, Error::Corrupt(_)) {
            rule!(!self.subject.is_sound, "{what} finds corruption in a sound image: {e}");
            rule!(self.image.info().corrupt, "the handle does not say that it is corrupt: {e}");
            let write = self.image.pwrite(&[0], 0);
            let is_refused = matches!(write, Err(Error::MarkedCorrupt | Error::Argument { .. }))
                || self.image.size() == 0 && matches!(write, Err(Error::OutOfRange { .. }));
            rule!(is_refused, "corrupt ({e}), but a write gives {write:?}");
        }
        let is_io = matches!(e, Error::Io { .. } | Error::Poisoned { .. } | Error::TooLarge { .. });
        self.failed |= is_io;
        if is_io {
            self.model = None;
        }
        false
    }

    /// An operation that changes guest bytes: all of it, or nothing if it was refused.
    fn change(&mut self, what: &str, at: u64, length: u64, byte: u8, result: Result<()>) {
        if self.note(what, result)
            && let Some(model) = &mut self.model
            && let Some(part) = model.get_mut(at as usize..(at + length) as usize)
        {
            part.fill(byte);
        }
    }

    fn step(&mut self, input: &mut Bytes<'_>) {
        let (size, cluster) = (self.image.size(), self.subject.seed.cluster);
        let what = input.u8();
        match what % 20 {
            0..=4 => {
                let at = input.place(size, cluster);
                let length = input.place(size, cluster).min(LENGTH_MAX);
                let result = self.image.pwrite(&vec![MARK; length as usize], at);
                self.change("write", at, length, MARK, result);
            }
            5 => {
                let at = input.place(size, cluster) / cluster * cluster;
                let length = (input.u8() as u64 % 4 + 1) * cluster;
                let bytes = vec![MARK; length.min(LENGTH_MAX) as usize];
                let flags = WriteFlags { compressed: true, fua: what & 0x80 == 0x80 };
                let result = self.image.write(&[IoSrc::from(&bytes[..])], GuestOffset(at), flags);
                self.change("compressed write", at, bytes.len() as u64, MARK, result);
            }
            6..=7 => {
                let (at, length) = (input.place(size, cluster), input.place(size, cluster));
                let flags = ZeroFlags { may_unmap: what & 0x80 == 0x80, ..ZeroFlags::default() };
                let result = self.image.write_zeroes(at, length, flags);
                self.change("zeroes", at, length, 0, result);
            }
            8..=9 => self.discard(input, size, cluster),
            10 => {
                let result = self.image.flush();
                if self.note("flush", result) && what & 0x80 == 0x80 {
                    self.check();
                }
            }
            11 => self.snapshot(),
            12 => self.apply(input),
            13 => {
                let id = self.some_snapshot(input);
                let result = self.image.snapshot_delete(&id, None);
                if self.note("delete", result) {
                    self.taken.retain(|(taken, _)| *taken != id); // the next snapshot may get the id
                }
            }
            14..=15 => self.bitmap(input, what),
            16 => self.resize(input),
            17 => {
                let at = input.place(size, cluster);
                let _ = self.image.map(GuestOffset(at), size.saturating_sub(at));
                self.compare();
            }
            _ => {
                let at = input.place(size, cluster);
                let mut bytes = vec![0; input.u16() as usize];
                let result = self.image.pread(&mut bytes, at);
                if self.note("read", result)
                    && let Some(model) = &self.model
                {
                    rule!(bytes == model[at as usize..at as usize + bytes.len()], "read at {at}");
                }
            }
        }
    }

    /// What a discard leaves is old or zero: the model takes it from the image.
    fn discard(&mut self, input: &mut Bytes<'_>, size: u64, cluster: u64) {
        let (at, length) = (input.place(size, cluster), input.place(size, cluster));
        let result = self.image.discard(at, length);
        if !self.note("discard", result) {
            return;
        }
        let Some(model) = &mut self.model else { return };
        let mut now = vec![0; length as usize];
        self.image.pread(&mut now, at).unwrap_or_else(|e| panic!("discarded, and then: {e}"));
        let was = &mut model[at as usize..(at + length) as usize];
        let is_fine = now.iter().zip(&*was).all(|(now, was)| now == was || *now == 0 && !self.ignores_discard);
        rule!(is_fine, "a discard at {at} of {length} shows something else");
        was.copy_from_slice(&now);
    }

    fn snapshot(&mut self) {
        let name = format!("taken {}", self.taken.len());
        let result = self.image.snapshot_create(&name, &SnapshotFacts::default());
        let result = result.map(|snapshot| String::from_utf8_lossy(&snapshot.id).into_owned());
        match result {
            Ok(id) => {
                if let Some(model) = &self.model {
                    self.taken.push((id, model.clone()));
                }
            }
            Err(e) => drop(self.note("snapshot", Err(e))),
        }
    }

    fn some_snapshot(&mut self, input: &mut Bytes<'_>) -> String {
        let number = input.u8() as usize;
        match self.taken.get(number % (self.taken.len() + 2)) {
            Some((id, _)) => id.clone(),
            None => if number & 0x80 == 0 { "first" } else { "second" }.to_owned(),
        }
    }

    fn apply(&mut self, input: &mut Bytes<'_>) {
        let id = self.some_snapshot(input);
        let result = self.image.snapshot_apply(&id);
        if !self.note("apply", result) {
            return;
        }
        if self.model.is_some() {
            let mut now = vec![0; self.image.size() as usize];
            self.image.pread(&mut now, 0).unwrap_or_else(|e| panic!("applied, and then: {e}"));
            if let Some((_, was)) = self.taken.iter().find(|(taken, _)| *taken == id) {
                rule!(now == *was, "snapshot {id} is not what it was");
            }
            self.model = Some(now);
        }
    }

    fn bitmap(&mut self, input: &mut Bytes<'_>, what: u8) {
        let name = ["one", "two", "three", "four"][input.u8() as usize % 4];
        let result = match what >> 5 {
            0..=1 => {
                self.bitmaps += 1;
                let options = BitmapOptions { granularity_bytes: 512 << (input.u8() % 10), disabled: what & 16 == 16 };
                self.image.bitmap_add(name, options)
            }
            2 => self.image.bitmap_remove(name),
            3 => self.image.bitmap_clear(name),
            4 => self.image.bitmap_enable(name, true),
            5 => self.image.bitmap_enable(name, false),
            6 => self.image.bitmap_merge(name, None, ["one", "three"][input.u8() as usize % 2]),
            _ => self.image.bitmap_extents(name, 0, self.image.size(), 64).map(drop),
        };
        self.note("bitmap", result);
    }

    fn check(&mut self) {
        let mut options = CheckOptions { memory_bytes: 1 << 20, ..CheckOptions::default() };
        let checked = self.image.check(&mut options);
        let is_clean = checked.as_ref().is_ok_and(|result| result.is_sound() && result.leaks == 0);
        rule!(is_clean || !self.subject.is_sound || self.failed, "{}: checked: {checked:?}", self.subject.seed.name);
        self.note("check", checked.map(drop));
    }

    fn resize(&mut self, input: &mut Bytes<'_>) {
        let how = input.u8();
        let size = match how & 3 {
            0 => input.u64() >> (how >> 2),
            _ => input.place(MODEL_MAX, self.subject.seed.cluster) / 512 * 512,
        };
        let preallocation = [Preallocation::Off, Preallocation::Off, Preallocation::Metadata, Preallocation::Full];
        let preallocation = if size <= MODEL_MAX { preallocation[how as usize >> 2 & 3] } else { Preallocation::Off };
        let result = self.image.resize(size, ResizeOptions { allow_shrink: how & 0x80 == 0x80, preallocation }, None);
        if self.note("resize", result) {
            let size = size.next_multiple_of(512);
            rule!(self.image.size() == size, "resized to {size}, and is {}", self.image.size());
            match &mut self.model {
                Some(model) if size <= MODEL_MAX => model.resize(size as usize, 0),
                _ => self.model = None,
            }
        }
    }

    fn compare(&mut self) {
        let Some(model) = &self.model else { return };
        let mut now = vec![0; model.len()];
        self.image.pread(&mut now, 0).unwrap_or_else(|e| panic!("a sound image does not read: {e}"));
        let wrong = now.iter().zip(model).position(|(now, model)| now != model);
        rule!(wrong.is_none(), "{}: byte {wrong:?} is something else", self.subject.seed.name);
    }
}
