//! Check and repair: a check writes nothing; a repair loses nothing that could be read, says what the next check says,
//! and leaves nothing for a second one to do.

use std::sync::Arc;

use qcow2::Image;
use qcow2::error::Error;
use qcow2::image::OpenOptions;
use qcow2::image::check::{CheckOptions, CheckResult, FindingKind, Repair, check_with};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::{Blocking, Storage};
use qcow2::wait::block_on;

use crate::bytes::Bytes;
use crate::disk::Disk;
use crate::heap::limited;
use crate::images::{Seed, open_options};
use crate::open_read::HEAP_MAX;
use crate::rule;
use crate::subject::Subject;

/// Of a larger disk, so much is compared.
const COMPARED_MAX: u64 = 512 << 10;

/// Checks and repairs.
pub fn check_repair(input: &[u8]) {
    let mut input = Bytes::new(input);
    let subject = Subject::take(&mut input);
    let repair = if input.u8() & 3 == 3 { Repair::Leaks } else { Repair::All };
    limited(HEAP_MAX, || on_image(&subject, repair));
}

/// What is told of an image, beside the result.
#[derive(Debug, Default)]
struct Told {
    findings: u64,
    /// A refcount block lies where something else does, an L2 table perhaps.
    block_taken: bool,
    /// Metadata lies where something else does.
    overlap: bool,
    /// Corruptions that are COPIED flags.
    flags: u64,
}

fn check(disk: &Arc<Disk>, repair: Repair) -> Result<(CheckResult, Told), Error> {
    let mut told = Told::default();
    crate::trace!("check with {repair:?}");
    let mut tell = |finding: &qcow2::image::check::Finding| {
        crate::trace!("{finding}");
        told.findings += 1;
        told.overlap |= finding.kind == FindingKind::Overlap;
        told.block_taken |= finding.kind == FindingKind::RefcountBlock;
        if finding.kind == FindingKind::CopiedFlag {
            told.flags += finding.clusters.max(1);
        }
    };
    let mut options =
        CheckOptions { repair, memory_bytes: 1 << 20, on_finding: Some(&mut tell), ..CheckOptions::default() };
    let storage = Arc::clone(disk) as Arc<dyn Storage>;
    let result = block_on(check_with(&Blocking, storage, "image", &OpenOptions::default(), &mut options));
    if let Ok(result) = &result
        && repair == Repair::Nothing
    {
        let something = result.corruptions + result.leaks + result.check_errors > 0;
        rule!(something == (told.findings > 0), "{} findings, but {result:?}", told.findings);
    }
    // Where counts have one bit, a taken block is told as an overlap.
    told.block_taken |= told.overlap && disk.bytes().get(96..100) == Some(&[0; 4]);
    result.map(|result| (result, told))
}

/// What the guest reads, sector by sector; `None` where that is an error.
fn content(seed: &Seed, bytes: &[u8]) -> Vec<Option<[u8; 512]>> {
    let options = OpenOptions { read_only: true, ..open_options(seed) };
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let Ok(image) = Image::open_storage(storage, &options) else { return Vec::new() };
    let sectors = image.size().min(COMPARED_MAX) / 512;
    let mut all = Vec::with_capacity(sectors as usize);
    for sector in 0..sectors {
        let mut found = [0; 512];
        all.push(image.pread(&mut found, sector * 512).is_ok().then_some(found));
    }
    all
}

fn on_image(subject: &Subject, repair: Repair) {
    let disk = Arc::new(Disk::new(subject.bytes.clone()));
    disk.freeze(true);
    let first = check(&disk, Repair::Nothing);
    disk.freeze(first.is_err());
    let Ok((first, told)) = first else {
        rule!(check(&disk, repair).is_err(), "not to be checked ({first:?}), but repaired");
        return;
    };
    let clean = first.is_sound() && first.leaks == 0;
    rule!(!subject.is_sound || clean, "a sound image is said to be wrong: {first:?}");
    let repaired = check(&disk, repair);
    let after = disk.bytes();
    if after == subject.bytes {
        return;
    }
    rule!(!subject.is_sound || subject.seed.name == "lazy", "a repair changed a sound image");
    let (before, now) = (content(subject.seed, &subject.bytes), content(subject.seed, &after));
    let lost = before.iter().enumerate().find(|(n, was)| was.is_some() && now.get(*n) != Some(*was));
    rule!(lost.is_none(), "sector {:?} reads something else after {first:?}, {repaired:?}", lost.map(|(n, _)| n));
    let Ok((repaired, _)) = repaired else { return };
    let (again, told_again) =
        check(&disk, Repair::Nothing).unwrap_or_else(|e| panic!("repaired, and then not to be checked: {e}"));
    let left = |result: &CheckResult| (result.corruptions, result.leaks, result.check_errors);
    rule!(left(&again) == left(&repaired), "{first:?}, repaired: {repaired:?}, and then: {again:?}");
    let second = check(&disk, repair).unwrap_or_else(|e| panic!("repaired, and then not to be repaired: {e}"));
    rule!(disk.bytes() == after, "a second repair wrote: {first:?}, {repaired:?}, {second:?}");
    // An L2 table that lies in a refcount block has other entries after every change of a count. And a table in which
    // something else lies is not written to: flags that the right count makes wrong stay there.
    let compared =
        |result: &CheckResult, told: &Told| result.corruptions - if told_again.overlap { told.flags } else { 0 };
    let is_worse = compared(&repaired, &told_again) > compared(&first, &told);
    rule!(told.block_taken || !is_worse, "more is wrong than before: {first:?}, {repaired:?}");
}
