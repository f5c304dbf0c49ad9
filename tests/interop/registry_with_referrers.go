// A registry of containers of another make, Google's go-containerregistry, which knows the API of referrers, behind
// docker's own check of tokens. With -subject it also says OCI-Subject, as the specification demands and theirs does not.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io"
	"log"
	"net/http"
	"strings"

	dcontext "github.com/docker/distribution/context"
	"github.com/docker/distribution/registry/auth"
	_ "github.com/docker/distribution/registry/auth/token"
	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	address := flag.String("address", "", "where it listens")
	realm := flag.String("realm", "", "the service of tokens")
	certificate := flag.String("certificate", "", "who signs them")
	subject := flag.Bool("subject", false, "say OCI-Subject")
	flag.Parse()
	tokens, err := auth.GetAccessController("token", map[string]interface{}{
		"realm": *realm, "service": "registry.test", "issuer": "tokens.test", "rootcertbundle": *certificate,
	})
	if err != nil {
		log.Fatal(err)
	}
	theirs := registry.New(registry.WithReferrersSupport(true))
	log.Fatal(http.ListenAndServe(*address, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// /v2/NAME/KIND/REFERENCE, where an upload of a blob has a part more
		parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
		access := []auth.Access{}
		for i, part := range parts {
			if i > 1 && (part == "blobs" || part == "manifests" || part == "referrers" || part == "tags") {
				name := strings.Join(parts[1:i], "/")
				actions := []string{"pull"}
				if r.Method != "GET" && r.Method != "HEAD" {
					actions = []string{"pull", "push"}
				}
				for _, action := range actions {
					access = append(access, auth.Access{Resource: auth.Resource{Type: "repository", Name: name}, Action: action})
				}
				break
			}
		}
		if _, err := tokens.Authorized(dcontext.WithRequest(context.Background(), r), access...); err != nil {
			if challenge, ok := err.(auth.Challenge); ok {
				challenge.SetHeaders(r, w)
			}
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if *subject && r.Method == "PUT" && len(parts) > 2 && parts[len(parts)-2] == "manifests" {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			var manifest struct{ Subject struct{ Digest string } }
			if json.Unmarshal(body, &manifest) == nil && manifest.Subject.Digest != "" {
				w.Header().Set("OCI-Subject", manifest.Subject.Digest)
			}
		}
		theirs.ServeHTTP(w, r)
	})))
}
