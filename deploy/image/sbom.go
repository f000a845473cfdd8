//go:build linux

package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"time"
)

// The parts of an SPDX document that are used (spdx.github.io/spdx-spec/v2.3).
type (
	spdxDocument struct {
		SPDXVersion       string             `json:"spdxVersion"`
		DataLicense       string             `json:"dataLicense"`
		SPDXID            string             `json:"SPDXID"`
		Name              string             `json:"name"`
		DocumentNamespace string             `json:"documentNamespace"`
		CreationInfo      spdxCreation       `json:"creationInfo"`
		Packages          []spdxPackage      `json:"packages"`
		Relationships     []spdxRelationship `json:"relationships"`
	}
	spdxCreation struct {
		Created  string   `json:"created"`
		Creators []string `json:"creators"`
	}
	spdxPackage struct {
		SPDXID           string          `json:"SPDXID"`
		Name             string          `json:"name"`
		Version          string          `json:"versionInfo"`
		DownloadLocation string          `json:"downloadLocation"`
		FilesAnalyzed    bool            `json:"filesAnalyzed"`
		LicenseDeclared  string          `json:"licenseDeclared"`
		SourceInfo       string          `json:"sourceInfo,omitempty"`
		Checksums        []spdxChecksum  `json:"checksums,omitempty"`
		References       []spdxReference `json:"externalRefs,omitempty"`
	}
	spdxChecksum struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	}
	spdxReference struct {
		Category string `json:"referenceCategory"`
		Type     string `json:"referenceType"`
		Locator  string `json:"referenceLocator"`
	}
	spdxRelationship struct {
		Element string `json:"spdxElementId"`
		Type    string `json:"relationshipType"`
		Related string `json:"relatedSpdxElement"`
	}
)

const unknown = "NOASSERTION" // SPDX's word

// writeSBOM writes what is in an image: the packages of Debian, weft, and the Go
// modules that weft is built of, as it says itself.
func writeSBOM(path string, o options, b built) error {
	d, err := sbom(o, b)
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// sbom makes the document.
func sbom(o options, b built) (spdxDocument, error) {
	const image = "SPDXRef-image"
	d := spdxDocument{
		SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT",
		Name:              fmt.Sprintf("weft %s for linux/%s", o.version, b.arch),
		DocumentNamespace: "https://github.com/weft-net/weft/spdx/" + b.digest.Hex,
		CreationInfo:      spdxCreation{Created: o.created.Format(time.RFC3339), Creators: []string{"Organization: weft", "Tool: weft-deploy-image"}},
	}
	add := func(from, kind string, p spdxPackage) {
		d.Packages = append(d.Packages, p)
		d.Relationships = append(d.Relationships, spdxRelationship{from, kind, p.SPDXID})
	}
	add(d.SPDXID, "DESCRIBES", spdxPackage{
		SPDXID: image, Name: "weft image", Version: o.version, DownloadLocation: unknown, LicenseDeclared: unknown,
		Checksums:  []spdxChecksum{{"SHA256", b.digest.Hex}},
		References: []spdxReference{{"PACKAGE-MANAGER", "purl", "pkg:oci/weft@sha256%3A" + b.digest.Hex + "?arch=" + b.arch}},
	})
	for _, p := range b.packages {
		add(image, "CONTAINS", spdxPackage{
			SPDXID: "SPDXRef-deb-" + p.Name, Name: p.Name, Version: p.Version, DownloadLocation: unknown, LicenseDeclared: unknown,
			SourceInfo: "files of this package of Debian, whose licence is in /usr/share/doc/" + p.Name + "/copyright",
			Checksums:  []spdxChecksum{{"SHA256", p.SHA256}},
			References: []spdxReference{{"PACKAGE-MANAGER", "purl", fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", p.Name, url.QueryEscape(p.Version), p.Arch)}},
		})
	}
	sum := sha256.Sum256(b.weft)
	const weft = "SPDXRef-weft"
	add(image, "CONTAINS", spdxPackage{
		SPDXID: weft, Name: "github.com/weft-net/weft", Version: o.version, DownloadLocation: unknown,
		LicenseDeclared: "Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)", SourceInfo: "commit " + o.commit,
		Checksums: []spdxChecksum{{"SHA256", hex.EncodeToString(sum[:])}},
	})
	info, err := buildinfo.Read(bytes.NewReader(b.weft))
	if err != nil {
		return d, fmt.Errorf("what weft is built of: %w", err)
	}
	module := func(id, name, version string) {
		add(weft, "CONTAINS", spdxPackage{
			SPDXID: id, Name: name, Version: version, DownloadLocation: unknown, LicenseDeclared: unknown,
			References: []spdxReference{{"PACKAGE-MANAGER", "purl", "pkg:golang/" + name + "@" + url.QueryEscape(version)}},
		})
	}
	module("SPDXRef-go-stdlib", "stdlib", info.GoVersion)
	for i, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		module(fmt.Sprintf("SPDXRef-go-%d", i), m.Path, m.Version)
	}
	return d, nil
}
