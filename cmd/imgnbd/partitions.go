package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/pflag"

	"github.com/imgnbd/imgnbd/image"
	"github.com/imgnbd/imgnbd/internal/partition"
)

// addPartition adds the option that chooses a partition by its number; 0 is
// the whole image.
func addPartition(fs *pflag.FlagSet, number *int) {
	value(fs, "partition", "P", func(s string) error {
		n, err := cInt(s, 16)
		if err != nil || n < 0 {
			return fmt.Errorf("--partition=%s is not the number of a partition", s)
		}
		*number = int(n)
		return nil
	})
}

// findPartition returns where a partition of dev is, in bytes; all of dev is 0
// and 0.
func findPartition(file string, dev image.Device, number int) (off, n int64, err error) {
	if number == 0 {
		return 0, 0, nil
	}
	table, err := partition.Read(dev, dev.Info().Size)
	if err == nil {
		_, off, n, err = table.Find(number)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", file, err)
		if !errors.Is(err, partition.ErrNone) {
			err = hinted(err, "imgnbd partitions shows the table")
		}
		return 0, 0, err
	}
	return off, n, nil
}

// partitionsCommand shows the partition table of an image, which it reads
// itself: no device is needed, and no kernel looks at it.
func partitionsCommand() *command {
	c := newCommand("partitions")
	var o imageOptions
	var form outputForm
	o.addFormat(c.flags)
	o.addImageOpts(c.flags)
	form.add(c.flags)
	o.addForceShare(c.flags)
	o.addBacking(c.flags)
	c.run = func(u *ui, operands []string) (err error) {
		file, err := oneImage(operands)
		if err != nil {
			return err
		}
		l, err := o.layout(u, file, c.flags.Changed("format"))
		if err != nil {
			return err
		}
		if l.table == nil {
			return fmt.Errorf("%s: %w%s", file, partition.ErrNone, holding(l.whole))
		}
		for _, damage := range l.table.Damage {
			u.warning(fmt.Sprintf("%s: %s", file, damage))
		}
		if form.json {
			return u.json(newTableJSON(l))
		}
		return u.tableText(file, l)
	}
	return c
}

// A layout is what an image holds, as far as its table and the beginnings of
// its partitions tell.
type layout struct {
	size     int64            // bytes
	table    *partition.Table // nil: there is none
	whole    partition.Content
	contents []partition.Content // of the table's partitions
}

// layout opens an image for reading and looks.
func (o *imageOptions) layout(u *ui, file string, formatGiven bool) (_ *layout, err error) {
	t, err := o.target(file, formatGiven, imgWords)
	if err != nil {
		return nil, err
	}
	t.opt.ReadOnly = true
	dev, err := t.open(context.Background(), o.chain(u))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	l := &layout{size: dev.Info().Size}
	if l.whole, err = partition.Identify(dev, 0, l.size); err == nil {
		l.table, err = partition.Read(dev, l.size)
	}
	if err != nil && !errors.Is(err, partition.ErrNone) {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if l.table == nil {
		return l, nil
	}
	l.contents = make([]partition.Content, len(l.table.Partitions))
	for i, p := range l.table.Partitions {
		if p.Problem != nil || p.Extended || i >= maxContents {
			continue
		}
		unit := l.table.SectorSize
		if l.contents[i], err = partition.Identify(dev, int64(p.Start)*unit, int64(p.Sectors)*unit); err != nil {
			u.warning(fmt.Sprintf("%s: partition %d: %v", file, p.Number, err))
		}
	}
	return l, nil
}

// maxContents is how many partitions are looked into: as many as Linux knows,
// of the thousands that a table may have.
const maxContents = 256

// holding says what was found where no table is.
func holding(c partition.Content) string {
	if c.Name == "" {
		return ""
	}
	return "; all of it is " + c.Name
}

type tableJSON struct {
	Scheme     partition.Scheme `json:"scheme"`
	ID         string           `json:"id"`
	SectorSize int64            `json:"sector-size"`
	Size       int64            `json:"size"`
	Partitions []partitionJSON  `json:"partitions"`
	Damage     []string         `json:"damage,omitempty"`
}

// A partitionJSON counts sectors, as the table does, which may say what no
// number of bytes can be.
type partitionJSON struct {
	Number     int    `json:"number"`
	Start      uint64 `json:"start"`
	Sectors    uint64 `json:"sectors"`
	Type       string `json:"type"`
	ID         string `json:"id,omitempty"`
	Name       string `json:"name,omitempty"`
	Attributes string `json:"attributes,omitempty"`
	Bootable   bool   `json:"bootable,omitempty"`
	Extended   bool   `json:"extended,omitempty"`
	Content    string `json:"content,omitempty"`
	Problem    string `json:"problem,omitempty"`
}

func newTableJSON(l *layout) *tableJSON {
	t := l.table
	j := &tableJSON{Scheme: t.Scheme, ID: t.ID, SectorSize: t.SectorSize, Size: l.size, Partitions: []partitionJSON{}}
	for i, p := range t.Partitions {
		pj := partitionJSON{p.Number, p.Start, p.Sectors, p.Type, p.ID, p.Name, p.Attrs, p.Bootable, p.Extended, l.contents[i].Name, ""}
		if p.Problem != nil {
			pj.Problem = p.Problem.Error()
		}
		j.Partitions = append(j.Partitions, pj)
	}
	for _, damage := range t.Damage {
		j.Damage = append(j.Damage, damage.Error())
	}
	return j
}

func (u *ui) tableText(file string, l *layout) error {
	t := l.table
	u.printf("%s: %s, %s table, sectors of %d bytes\n", file, sizeText(l.size), t.Scheme, t.SectorSize)
	if len(t.Partitions) == 0 {
		return nil
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NUMBER\tSTART\tSECTORS\tSIZE\tCONTENT\tTYPE")
	for i, p := range t.Partitions {
		content := l.contents[i].Name
		switch {
		case p.Problem != nil:
			content = "unusable"
		case p.Extended:
			content = "logical ones"
		case content == "":
			content = "-"
		}
		kind := p.Type
		if p.Name != "" {
			kind += " " + printable(p.Name)
		}
		fmt.Fprintf(w, "%d\t%d\t%d\t%s\t%s\t%s\n", p.Number, p.Start, p.Sectors, sectorsText(p.Sectors, t.SectorSize), content, kind)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	u.printf("%s", b.String())
	for _, p := range t.Partitions {
		if p.Problem != nil {
			u.warning(fmt.Sprintf("%s: %s", file, p.Problem))
		}
	}
	return nil
}

// sectorsText is the size of a partition for people.
func sectorsText(sectors uint64, unit int64) string {
	if sectors > uint64((1<<63-1)/unit) {
		return "-"
	}
	return sizeText(int64(sectors) * unit)
}
