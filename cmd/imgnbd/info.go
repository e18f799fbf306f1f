package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/imgnbd/imgnbd/image"
)

// infoCommand shows what an image says of itself, as qemu-img info does, to
// the byte. It reads the header and opens nothing that the image names, so it
// works on what cannot be served, and an image cannot make it read a file.
func infoCommand() *command {
	c := newCommand("info")
	var o imageOptions
	var form outputForm
	var chain bool
	o.addFormat(c.flags)
	o.addImageOpts(c.flags)
	form.add(c.flags)
	c.flags.BoolVar(&chain, "backing-chain", false, "")
	o.addForceShare(c.flags)
	o.addBacking(c.flags)
	c.run = func(u *ui, operands []string) error {
		file, err := oneImage(operands)
		if err != nil {
			return err
		}
		t, err := o.target(file, c.flags.Changed("format"), imgWords)
		if err != nil {
			return err
		}
		images := o.chain(u)
		var all []*image.Inspected
		if chain {
			all, err = images.InspectChain(context.Background(), t.name, t.opt)
		} else {
			var in *image.Inspected
			in, err = images.Inspect(context.Background(), t.name, t.opt)
			all = []*image.Inspected{in}
		}
		if err != nil {
			return t.failed(err)
		}
		for _, in := range all {
			if in.Problem != nil {
				u.warning(printable(fmt.Sprintf("%s cannot be opened: %v", in.Name, in.Problem)))
			}
		}
		if form.json {
			return u.infoJSON(all, chain)
		}
		return u.infoText(all)
	}
	return c
}

// The fields are in the order in which qemu-img prints them, which is that of
// a hash table.
type infoJSON struct {
	BackingFormat string         `json:"backing-filename-format,omitempty"`
	Snapshots     []snapshotJSON `json:"snapshots,omitempty"`
	VirtualSize   *int64         `json:"virtual-size,omitempty"`
	Filename      string         `json:"filename"`
	ClusterSize   int64          `json:"cluster-size,omitempty"`
	Format        string         `json:"format"`
	ActualSize    *int64         `json:"actual-size,omitempty"`
	Specific      *specificJSON  `json:"format-specific,omitempty"`
	FullBacking   string         `json:"full-backing-filename,omitempty"`
	Encrypted     bool           `json:"encrypted,omitempty"`
	Backing       string         `json:"backing-filename,omitempty"`
	Dirty         bool           `json:"dirty-flag"`
}

type snapshotJSON struct {
	ICount      *int64 `json:"icount,omitempty"`
	VMClockNsec int64  `json:"vm-clock-nsec"`
	Name        string `json:"name"`
	DateSec     int64  `json:"date-sec"`
	DateNsec    int    `json:"date-nsec"`
	VMClockSec  int64  `json:"vm-clock-sec"`
	ID          string `json:"id"`
	VMStateSize int64  `json:"vm-state-size"`
}

type specificJSON struct {
	Type string `json:"type"`
	Data any    `json:"data"`
}

func newInfoJSON(in *image.Inspected) *infoJSON {
	j := &infoJSON{
		BackingFormat: in.BackingFormat,
		Filename:      in.Name,
		ClusterSize:   in.ClusterSize,
		Format:        in.Format,
		FullBacking:   in.Backing,
		Encrypted:     in.Encrypted,
		Backing:       in.BackingName,
		Dirty:         in.Dirty,
	}
	if in.VirtualSize >= 0 {
		j.VirtualSize = &in.VirtualSize
	}
	if in.DiskSize >= 0 {
		j.ActualSize = &in.DiskSize
	}
	if in.Specific != nil {
		j.Specific = &specificJSON{in.Format, in.Specific}
	}
	for _, s := range in.Snapshots {
		sj := snapshotJSON{
			VMClockNsec: int64(s.VMClock % time.Second),
			Name:        s.Name,
			DateSec:     s.Created.Unix(),
			DateNsec:    s.Created.Nanosecond(),
			VMClockSec:  int64(s.VMClock / time.Second),
			ID:          s.ID,
			VMStateSize: s.VMStateSize,
		}
		if s.ICount >= 0 {
			sj.ICount = &s.ICount
		}
		j.Snapshots = append(j.Snapshots, sj)
	}
	return j
}

// infoJSON prints an object, or for a chain an array of them.
func (u *ui) infoJSON(all []*image.Inspected, chain bool) error {
	if !chain {
		return u.json(newInfoJSON(all[0]))
	}
	list := make([]*infoJSON, len(all))
	for i, in := range all {
		list[i] = newInfoJSON(in)
	}
	return u.json(list)
}

// infoText prints images for people, with an empty line between them.
func (u *ui) infoText(all []*image.Inspected) error {
	var b strings.Builder
	for i, in := range all {
		if i > 0 {
			b.WriteString("\n")
		}
		if err := writeInfo(&b, in); err != nil {
			return err
		}
	}
	u.printf("%s", b.String())
	return nil
}

func writeInfo(b *strings.Builder, in *image.Inspected) error {
	diskSize := "unavailable"
	if in.DiskSize >= 0 {
		diskSize = sizeText(in.DiskSize)
	}
	virtualSize := "unknown"
	if in.VirtualSize >= 0 {
		virtualSize = fmt.Sprintf("%s (%d bytes)", sizeText(in.VirtualSize), in.VirtualSize)
	}
	fmt.Fprintf(b, "image: %s\nfile format: %s\nvirtual size: %s\ndisk size: %s\n", printable(in.Name), in.Format, virtualSize, diskSize)
	if in.Encrypted {
		b.WriteString("encrypted: yes\n")
	}
	if in.ClusterSize != 0 {
		fmt.Fprintf(b, "cluster_size: %d\n", in.ClusterSize)
	}
	if in.Dirty {
		b.WriteString("cleanly shut down: no\n")
	}
	if in.BackingName != "" {
		fmt.Fprintf(b, "backing file: %s", printable(in.BackingName))
		switch in.Backing {
		case in.BackingName:
		case "":
			b.WriteString(" (cannot determine actual path)")
		default:
			fmt.Fprintf(b, " (actual path: %s)", printable(in.Backing))
		}
		b.WriteString("\n")
		if in.BackingFormat != "" {
			fmt.Fprintf(b, "backing file format: %s\n", printable(in.BackingFormat))
		}
	}
	if len(in.Snapshots) > 0 {
		fmt.Fprintf(b, "Snapshot list:\n%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
		for _, s := range in.Snapshots {
			writeSnapshot(b, &s)
		}
	}
	if in.Specific == nil {
		return nil
	}
	text, err := json.Marshal(in.Specific)
	if err != nil {
		return err
	}
	b.WriteString("Format specific information:\n")
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	return writeSpecific(b, dec, 0)
}

func writeSnapshot(b *strings.Builder, s *image.Snapshot) {
	icount := ""
	if s.ICount >= 0 {
		icount = fmt.Sprint(s.ICount)
	}
	secs := int64(s.VMClock / time.Second)
	clock := fmt.Sprintf("%02d:%02d:%02d.%03d", secs/3600, secs/60%60, secs%60, s.VMClock/time.Millisecond%1000)
	fmt.Fprintf(b, "%-9s %-16s %8s%20s%13s%11s\n", printable(s.ID), printable(s.Name), sizeText(s.VMStateSize),
		s.Created.Local().Format("2006-01-02 15:04:05"), clock, icount)
}

// writeSpecific prints a JSON value as QEMU prints it for people: an indented
// line for each member.
func writeSpecific(b *strings.Builder, dec *json.Decoder, depth int) error {
	tok, err := dec.Token()
	if err != nil {
		return err
	}
	delim, composite := tok.(json.Delim)
	if !composite {
		fmt.Fprintf(b, " %s\n", printable(fmt.Sprint(tok)))
		return nil
	}
	if depth > 0 {
		b.WriteString("\n")
	}
	for i := 0; dec.More(); i++ {
		name := fmt.Sprintf("[%d]", i)
		if delim == '{' {
			if tok, err = dec.Token(); err != nil {
				return err
			}
			name = strings.ReplaceAll(fmt.Sprint(tok), "-", " ")
		}
		fmt.Fprintf(b, "%*s%s:", 4*(depth+1), "", name)
		if err := writeSpecific(b, dec, depth+1); err != nil {
			return err
		}
	}
	_, err = dec.Token()
	return err
}

// sizeText is a size for people: three digits and a unit.
func sizeText(n int64) string {
	// One more than the power of 2, where 1000 of a unit are one of the next.
	_, exp := math.Frexp(float64(n) / (1000.0 / 1024.0))
	i := max(exp-1, 0) / 10
	return fmt.Sprintf("%.3g %sB", float64(n)/float64(int64(1)<<(10*i)),
		[]string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}[i])
}
