//! The facts about an image that its header and its file tell, and their JSON form.

use std::fmt::Write;

use super::bitmaps::BitmapInfo;
use crate::format::header::{COMPATIBLE_LAZY_REFCOUNTS, Encryption, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY};
use crate::format::{BackingName, Compression, Header, Snapshot};

/// What is known about an image without looking at its tables or at the files that it refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Size of the disk as the guest sees it.
    pub size_bytes: u64,
    /// Cluster size.
    pub cluster_size_bytes: u64,
    /// Subclusters in a cluster: 32 with extended L2 entries, else 1.
    pub subclusters: u32,
    /// Extended L2 entries.
    pub extended_l2: bool,
    /// Width of refcounts.
    pub refcount_bits: u32,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Refcounts may be wrong.
    pub dirty: bool,
    /// Marked corrupt.
    pub corrupt: bool,
    /// Guest data is encrypted.
    pub encrypted: bool,
    /// Method of compressed clusters.
    pub compression: Compression,
    /// The backing file, as the image names it.
    pub backing: Option<BackingName>,
    /// Guest data is in an external data file.
    pub external_data_file: bool,
    /// The external data file, as the image names it.
    pub data_file: Option<String>,
    /// The external data file is a raw image by itself.
    pub data_file_raw: bool,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// The bitmaps, where the image could be asked for them.
    pub bitmaps: Vec<BitmapInfo>,
    /// The snapshots themselves, where somebody has read them: they are not in the header.
    pub snapshot_list: Vec<Snapshot>,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Size of the image file.
    pub file_size_bytes: u64,
    /// What the image file occupies on its disk, where that is known.
    pub allocated_bytes: Option<u64>,
}

impl Info {
    /// Collects the facts.
    pub fn new(header: &Header, file_size_bytes: u64, allocated_bytes: Option<u64>) -> Self {
        let geometry = header.geometry;
        Self {
            version: geometry.version,
            size_bytes: header.size_bytes,
            cluster_size_bytes: geometry.cluster_size_bytes(),
            subclusters: geometry.subclusters(),
            extended_l2: geometry.extended_l2,
            refcount_bits: geometry.refcount_bits(),
            lazy_refcounts: header.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0,
            dirty: header.incompatible & INCOMPATIBLE_DIRTY != 0,
            corrupt: header.incompatible & INCOMPATIBLE_CORRUPT != 0,
            encrypted: header.encryption != Encryption::None,
            compression: header.compression,
            backing: header.backing.clone(),
            external_data_file: header.has_data_file(),
            data_file: header.data_file_name(),
            data_file_raw: header.data_file_is_raw(),
            snapshots: header.snapshots,
            bitmaps: Vec::new(),
            snapshot_list: Vec::new(),
            incompatible: header.incompatible,
            compatible: header.compatible,
            autoclear: header.autoclear,
            file_size_bytes,
            allocated_bytes,
        }
    }

    /// The version as `qemu-img` calls it: 0.10 or 1.1.
    pub fn compat(&self) -> &'static str {
        if self.version < 3 { "0.10" } else { "1.1" }
    }

    /// The method of compressed clusters as `qemu-img` calls it: zlib or zstd.
    pub fn compression_name(&self) -> &'static str {
        match self.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }

    /// What `qemu-img info --output=json` prints, with its keys in its order. `filename` is the name by which the
    /// caller opened the image. Lists that are read from other places than the header are part of it as far as
    /// somebody has read them; encryption slots are not.
    pub fn to_json(&self, filename: &str) -> String {
        let mut json = Json::default();
        json.object(None, |json| {
            json.array("children", |json| json.object(None, |json| self.file_child(json, filename)));
            if let Some(format) = self.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
                json.string("backing-filename-format", format);
            }
            if !self.snapshot_list.is_empty() {
                json.array("snapshots", |json| {
                    self.snapshot_list.iter().for_each(|s| json.object(None, |json| snapshot(json, s)));
                });
            }
            json.number("virtual-size", self.size_bytes);
            json.string("filename", filename);
            json.number("cluster-size", self.cluster_size_bytes);
            json.string("format", "qcow2");
            if let Some(allocated) = self.allocated_bytes {
                json.number("actual-size", allocated);
            }
            if self.encrypted {
                json.bool("encrypted", true);
            }
            json.object(Some("format-specific"), |json| {
                json.string("type", "qcow2");
                json.object(Some("data"), |json| self.format_specific(json));
            });
            if let Some(backing) = &self.backing {
                json.string("full-backing-filename", &full_backing_name(filename, &backing.name));
                json.string("backing-filename", &backing.name);
            }
            json.bool("dirty-flag", self.dirty);
        });
        json.finish()
    }

    fn file_child(&self, json: &mut Json, filename: &str) {
        json.string("name", "file");
        json.object(Some("info"), |json| {
            json.array("children", |_| {});
            // Files are counted in sectors there.
            json.number("virtual-size", self.file_size_bytes.div_ceil(512).saturating_mul(512));
            json.string("filename", filename);
            json.string("format", "file");
            if let Some(allocated) = self.allocated_bytes {
                json.number("actual-size", allocated);
            }
            json.object(Some("format-specific"), |json| {
                json.string("type", "file");
                json.object(Some("data"), |_| {});
            });
            json.bool("dirty-flag", false);
        });
    }

    fn format_specific(&self, json: &mut Json) {
        json.string("compat", self.compat());
        json.string("compression-type", self.compression_name());
        if self.version >= 3 {
            json.bool("lazy-refcounts", self.lazy_refcounts);
        }
        if !self.bitmaps.is_empty() {
            json.array("bitmaps", |json| {
                self.bitmaps.iter().for_each(|bitmap| json.object(None, |json| bitmap_entry(json, bitmap)));
            });
        }
        json.number("refcount-bits", self.refcount_bits.into());
        if self.version >= 3 {
            if self.external_data_file {
                if let Some(name) = &self.data_file {
                    json.string("data-file", name);
                }
                json.bool("data-file-raw", self.data_file_raw);
            }
            json.bool("corrupt", self.corrupt);
            json.bool("extended-l2", self.extended_l2);
        }
    }
}

fn bitmap_entry(json: &mut Json, bitmap: &BitmapInfo) {
    json.array("flags", |json| {
        for (flag, on) in [("in-use", bitmap.in_use), ("auto", bitmap.enabled)] {
            if on {
                json.text(flag);
            }
        }
    });
    json.string("name", &bitmap.name);
    json.number("granularity", bitmap.granularity_bytes);
}

fn snapshot(json: &mut Json, snapshot: &Snapshot) {
    const SECOND: u64 = 1_000_000_000;
    if let Some(icount) = snapshot.icount() {
        json.number("icount", icount);
    }
    json.number("vm-clock-nsec", snapshot.vm_clock_nsec % SECOND);
    json.string("name", &String::from_utf8_lossy(&snapshot.name));
    json.number("date-sec", snapshot.date_sec.into());
    json.number("date-nsec", snapshot.date_nsec.into());
    json.number("vm-clock-sec", snapshot.vm_clock_nsec / SECOND);
    json.string("id", &String::from_utf8_lossy(&snapshot.id));
    json.number("vm-state-size", snapshot.vm_state_bytes());
}

/// The backing file's name from where the caller is: relative to the folder of the image, unless it is absolute or
/// has a protocol.
fn full_backing_name(image: &str, backing: &str) -> String {
    if backing.starts_with('/') || protocol_bytes(backing) > 0 {
        return backing.to_owned();
    }
    let folder = image.rfind('/').map_or(0, |slash| slash + 1).max(protocol_bytes(image));
    format!("{}{backing}", &image[..folder])
}

/// Length of a protocol prefix: up to a colon before the first slash.
fn protocol_bytes(name: &str) -> usize {
    match name.find([':', '/']) {
        Some(at) if name.as_bytes()[at] == b':' => at + 1,
        _ => 0,
    }
}

/// A JSON text that grows, in the layout of `qemu-img`: one value a line, four spaces a level.
#[derive(Default)]
struct Json {
    text: String,
    depth: usize,
    has_items: bool,
}

impl Json {
    fn item(&mut self, key: Option<&str>) {
        if self.has_items {
            self.text.push(',');
        }
        if self.depth > 0 {
            self.new_line();
        }
        if let Some(key) = key {
            self.text.push('"');
            self.text.push_str(key);
            self.text.push_str("\": ");
        }
        self.has_items = true;
    }

    fn new_line(&mut self) {
        self.text.push('\n');
        self.text.extend(std::iter::repeat_n("    ", self.depth));
    }

    fn nested(&mut self, key: Option<&str>, brackets: [char; 2], fill: impl FnOnce(&mut Self)) {
        self.item(key);
        self.text.push(brackets[0]);
        self.depth += 1;
        self.has_items = false;
        fill(self);
        self.depth -= 1;
        self.new_line();
        self.text.push(brackets[1]);
        self.has_items = true;
    }

    fn object(&mut self, key: Option<&str>, fill: impl FnOnce(&mut Self)) {
        self.nested(key, ['{', '}'], fill);
    }

    fn array(&mut self, key: &str, fill: impl FnOnce(&mut Self)) {
        self.nested(Some(key), ['[', ']'], fill);
    }

    fn number(&mut self, key: &str, value: u64) {
        self.item(Some(key));
        let _ = write!(self.text, "{value}"); // into a String: cannot fail
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.item(Some(key));
        self.text.push_str(if value { "true" } else { "false" });
    }

    fn string(&mut self, key: &str, value: &str) {
        self.item(Some(key));
        self.quoted(value);
    }

    /// A string in an array.
    fn text(&mut self, value: &str) {
        self.item(None);
        self.quoted(value);
    }

    fn quoted(&mut self, value: &str) {
        self.text.push('"');
        for c in value.chars() {
            self.character(c);
        }
        self.text.push('"');
    }

    /// ASCII only: the text survives whatever encoding it is taken for.
    fn character(&mut self, c: char) {
        match c {
            '"' => self.text.push_str("\\\""),
            '\\' => self.text.push_str("\\\\"),
            '\u{8}' => self.text.push_str("\\b"),
            '\u{c}' => self.text.push_str("\\f"),
            '\n' => self.text.push_str("\\n"),
            '\r' => self.text.push_str("\\r"),
            '\t' => self.text.push_str("\\t"),
            ' '..='~' => self.text.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(self.text, "\\u{unit:04X}"); // into a String: cannot fail
                }
            }
        }
    }

    fn finish(mut self) -> String {
        self.text.push('\n');
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_backing_names() {
        for (image, backing, full) in [
            ("a", "b", "b"),
            ("dir/a", "b", "dir/b"),
            ("/x/y/a", "../b", "/x/y/../b"),
            ("dir/a", "/b", "/b"),
            ("dir/a", "nbd://host/b", "nbd://host/b"),
            ("dir/a", "d/x:y", "dir/d/x:y"),
            ("file:a", "b", "file:b"),
        ] {
            assert_eq!(full_backing_name(image, backing), full);
        }
    }

    #[test]
    fn strings_are_escaped() {
        let mut json = Json::default();
        json.object(None, |json| json.string("k", "b\u{e9}\"\\\u{1}\u{7f}/\u{1f600}\t"));
        assert_eq!(json.finish(), "{\n    \"k\": \"b\\u00E9\\\"\\\\\\u0001\\u007F/\\uD83D\\uDE00\\t\"\n}\n");
    }
}
