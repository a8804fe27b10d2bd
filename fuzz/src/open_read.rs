//! Open an image for reading and look at everything: nothing is ever written.

use std::sync::Arc;

use qcow2::Image;
use qcow2::error::Error;
use qcow2::format::GuestOffset;

use crate::bytes::Bytes;
use crate::disk::Disk;
use crate::heap::limited;
use crate::images::open_options;
use crate::rule;
use crate::subject::Subject;

/// Memory of one input, the subject itself included.
pub const HEAP_MAX: usize = 64 << 20;
/// Bytes that are read, and pieces of a disk that are listed, at most.
const READ_MAX: u64 = 1 << 20;
const EXTENTS_MAX: usize = 500;

/// Opens and reads.
pub fn open_read(input: &[u8]) {
    let mut input = Bytes::new(input);
    let subject = Subject::take(&mut input);
    limited(HEAP_MAX, || look(&subject, &mut input));
}

fn look(subject: &Subject, input: &mut Bytes<'_>) {
    let disk = Arc::new(Disk::new(subject.bytes.clone()));
    disk.freeze(true);
    let how = input.u8();
    let mut options = open_options(subject.seed);
    options.read_only = true;
    options.inspect = how & 1 == 1 && how & 2 == 2;
    if how & 4 == 4 {
        options.snapshot = Some(if how & 8 == 8 { "first" } else { "2" }.to_owned());
    }
    let image = match Image::open_storage(disk.clone(), &options) {
        Ok(image) => image,
        Err(e) => {
            rule!(!subject.is_sound || options.snapshot.is_some(), "a sound image is refused: {e}");
            return;
        }
    };
    let info = image.info_with_lists().to_json("image");
    rule!(info.starts_with('{') && info.trim_end().ends_with('}'), "info is no JSON: {info}");
    let size = image.size();
    let mut piece = vec![0; 64 << 10];
    for _ in 0..8 {
        let at = input.place(size, subject.seed.cluster);
        let length = (u64::from(input.u16()) + 1).min(piece.len() as u64) as usize;
        let read = image.pread(&mut piece[..length], at);
        let is_inside = at.checked_add(length as u64).is_some_and(|end| end <= size);
        rule!(is_inside || read.is_err(), "read past the end: {at} {length} of {size}");
        rule!(!matches!(read, Err(Error::OutOfRange { .. })) || !is_inside, "refused inside: {at} {length} of {size}");
    }
    if subject.is_sound && options.snapshot.is_none() && !options.inspect {
        let mut all = vec![0; size as usize];
        image.pread(&mut all, 0).unwrap_or_else(|e| panic!("a sound image does not read: {e}"));
        rule!(all == subject.seed.content, "{}: reads something else", subject.seed.name);
    } else {
        for at in (0..size.min(READ_MAX)).step_by(piece.len()) {
            let n = (size - at).min(piece.len() as u64) as usize;
            let _ = image.pread(&mut piece[..n], at);
        }
    }
    map(&image, size);
    lists(&image, size);
    image.close().unwrap_or_else(|e| panic!("a read-only image does not close: {e}"));
}

fn map(image: &Image, size: u64) {
    let mut at = 0;
    for _ in 0..EXTENTS_MAX {
        if at >= size {
            return;
        }
        match image.map(GuestOffset(at), size - at) {
            Ok(extent) => {
                let fits = extent.start.0 == at && extent.length > 0 && extent.length <= size - at;
                rule!(fits, "{extent:?} at {at} of {size}");
                at += extent.length;
            }
            Err(_) => at = (at + 512) & !511,
        }
    }
}

fn lists(image: &Image, size: u64) {
    for snapshot in image.snapshots().unwrap_or_default().iter().take(4) {
        let name = String::from_utf8_lossy(&snapshot.id).into_owned();
        if let Ok(old) = image.snapshot_open(&name) {
            let mut sector = [0; 512];
            let _ = old.pread(&mut sector, 0);
            let _ = old.map(GuestOffset(0), old.size());
        }
    }
    for bitmap in image.bitmap_list().unwrap_or_default().iter().take(4) {
        if let Ok(extents) = image.bitmap_extents(&bitmap.name, 0, size, 100) {
            rule!(extents.len() <= 100, "more extents than were asked for");
        }
    }
}
