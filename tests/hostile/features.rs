//! Images with bitmaps, and with an external data file. What a damage there makes of the guest's data is not followed here:
//! whatever the image says, every call ends, with a clear error or without one, what is refused is not written to, and
//! nothing that looks like a sound disk is made of a file that is shorter than its tables say.

use std::sync::Arc;

use qcow2::error::{Error, ErrorCode};
use qcow2::image::{BitmapOptions, Image, OpenOptions, Preallocation, ResizeOptions};
use qcow2::storage::Storage;
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::DiskImage;

use crate::damage::{Damage, Part, Site};
use crate::fixture::Fixture;
use crate::guarded::Guarded;
use crate::judge::{self, Layout};
use crate::qemu;

/// An image with two bitmaps, and the content of its data file, if it is to have one.
pub fn make(dir: &qemu::Dir, with_data_file: bool) -> (Fixture, Option<Vec<u8>>) {
    let (path, data) = (dir.path("image"), dir.path("data"));
    let mut options = "cluster_size=4k".to_owned();
    if with_data_file {
        options += &format!(",data_file={data}");
    }
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, &path, &(40 * 4096 + 512).to_string()]);
    qemu::img(&["bitmap", "--add", "-g", "512", &path, "on"]);
    qemu::img(&["bitmap", "--add", "--disable", &path, "off"]);
    qemu::io(&path, &["write -q -P 1 0 8k", "write -q -P 2 100k 2k", "write -q -z 32k 8k"]);
    qemu::img(&["bitmap", "--merge", "on", &path, "off"]);
    let bytes = std::fs::read(&path).unwrap();
    let content = with_data_file.then(|| std::fs::read(&data).unwrap());
    (Fixture { path, bytes, expected: Vec::new(), cluster: 4096, raw_backing: None }, content)
}

/// The words of the header, of the tables, and of all that there is of the bitmaps.
pub fn sites(fixture: &Fixture) -> Vec<Site> {
    let image = DiskImage::new(fixture.bytes.clone());
    let layout = Layout::parse(&image).unwrap();
    let (at, length, _) = judge::bitmaps::directory(&layout).unwrap().unwrap();
    let tables = judge::bitmaps(&layout).unwrap().into_iter().map(|b| (Part::Header, b.table_offset, 16));
    let l2 = layout.u64(layout.l1_offset) & 0x00ff_ffff_ffff_fe00;
    let areas =
        [(Part::Header, 0, 512), (Part::Header, at, length), (Part::L1, layout.l1_offset, 8), (Part::L2, l2, 64)];
    let words = |(part, at, length): (Part, u64, u64)| {
        (at..at + length).step_by(8).map(move |at| Site {
            part,
            bytes: at as usize..at as usize + 8,
            guest: Vec::new(),
        })
    };
    areas.into_iter().chain(tables).flat_map(words).collect()
}

/// What is wrong with an error, if anything: each says what it is about.
fn clear<T>(result: Result<T, Error>, what: &str) -> Result<(), String> {
    match result {
        Err(e) if e.code() == ErrorCode::Panic || e.to_string().len() < 8 => Err(format!("{what}: {e:?}")),
        _ => Ok(()),
    }
}

/// What a user does with such an image, on a damaged one.
pub fn on_image(fixture: &Fixture, data: Option<&[u8]>, site: &Site, damage: Damage) -> Result<&'static str, String> {
    let damaged = damage.apply(&fixture.bytes, site);
    let storage = Arc::new(Guarded::new(damaged.clone()));
    let beside = data.map(|bytes| Arc::new(MemoryStorage::new(bytes.to_vec())) as Arc<dyn Storage>);
    let options = OpenOptions { data_file_storages: beside.into_iter().map(Some).collect(), ..OpenOptions::default() };
    let image = match Image::open_storage(storage.clone(), &options) {
        Ok(image) => image,
        Err(e) => {
            let is_unchanged = storage.changes() == 0 && storage.bytes() == damaged;
            return if is_unchanged || e == Error::NeedsRepair {
                Ok("refused")
            } else {
                Err(format!("{e}, but wrote"))
            };
        }
    };
    let size = image.size();
    clear(image.pread(&mut [0; 4096], 100 << 10), "read")?;
    let listed = image.bitmap_list();
    for bitmap in listed.iter().flatten() {
        clear(image.bitmap_extents(&bitmap.name, 0, size, 100), "extents")?;
    }
    clear(image.pwrite(&[3; 3000], 9000), "write")?;
    clear(image.bitmap_add("new", BitmapOptions::default()), "add")?;
    clear(image.bitmap_merge("off", None, "on"), "merge")?;
    clear(image.bitmap_clear("on"), "clear")?;
    let ahead = ResizeOptions { allow_shrink: true, preallocation: Preallocation::Metadata };
    clear(image.resize(size.saturating_add(20_000), ahead, None), "grow")?;
    let grown = image.size() > size;
    let shrink = ResizeOptions { preallocation: Preallocation::Off, ..ahead };
    if size < 1 << 30 {
        clear(image.resize(size / 2, shrink, None), "shrink")?;
    }
    clear(image.bitmap_remove("off"), "remove")?;
    clear(image.close(), "close")?;
    Ok(if grown { "went on" } else { "corrupt or refused in part" })
}
