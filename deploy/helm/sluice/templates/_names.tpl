{{- define "sluice.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}

{{- define "sluice.labels" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "sluice.gatewaySelector" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: gateway
{{- end }}

{{- /* Workers of one variant. Takes {root, model, variant}. */ -}}
{{- define "sluice.workerSelector" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: worker
sluice/worker: {{ include "sluice.workerName" . }}
{{- end }}

{{- /* A DNS label of model and variant; the hash keeps names apart that differ in what a label cannot hold. */ -}}
{{- define "sluice.workerName" -}}
{{- $public := printf "%s:%s" .model.name .variant.name -}}
{{- $label := regexReplaceAll "[^a-z0-9]+" (lower $public) "-" | trunc 30 | trimAll "-" -}}
{{ include "sluice.name" .root | trunc 20 | trimSuffix "-" }}-{{ $label }}-{{ sha256sum $public | trunc 6 }}
{{- end }}

{{- define "sluice.gatewayImage" -}}
{{- $image := .Values.gateway.image -}}
{{- if $image.digest -}}{{ $image.repository }}@{{ $image.digest }}
{{- else -}}{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}{{- end }}
{{- end }}

{{- /* A variant with what it leaves out filled in, as YAML. */ -}}
{{- define "sluice.variant" -}}
{{- toYaml (mergeOverwrite (deepCopy .root.Values.variantDefaults) .variant) }}
{{- end }}

{{- define "sluice.grace" -}}
{{- with .Values.gateway.drain }}{{ add .noticeSeconds .queueSeconds .timeoutSeconds 10 }}{{ end }}
{{- end }}

{{- define "sluice.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "sluice.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* How the gateway reaches the server that all share. */ -}}
{{- define "sluice.redis" -}}
{{- $given := .Values.redis -}}
{{- $ways := compact (list $given.url $given.urlSecret.name $given.sentinel.master (join "," $given.cluster)) -}}
{{- if ne (len $ways) 1 }}{{ fail "redis.url, redis.urlSecret.name, redis.sentinel.master or redis.cluster: exactly one says where the queue is that gateways share" }}{{ end -}}
{{- $redis := dict "prefix" (include "sluice.name" .) -}}
{{- if $given.url }}{{ $_ := set $redis "url" $given.url }}{{ end -}}
{{- if $given.cluster }}{{ $_ := set $redis "cluster" $given.cluster }}{{ end -}}
{{- with $given.sentinel }}{{ if .master -}}
  {{- $sentinel := dict "master" .master "nodes" .nodes -}}
  {{- if .username }}{{ $_ := set $sentinel "username" .username }}{{ end -}}
  {{- if .passwordSecret.name }}{{ $_ := set $sentinel "password_file" "/etc/sluice/redis/sentinel-password" }}{{ end -}}
  {{- $_ := set $redis "sentinel" $sentinel -}}
{{- end }}{{ end -}}
{{- if $given.username }}{{ $_ := set $redis "username" $given.username }}{{ end -}}
{{- if $given.passwordSecret.name }}{{ $_ := set $redis "password_file" "/etc/sluice/redis/password" }}{{ end -}}
{{- if $given.tls }}{{ $_ := set $redis "tls" dict }}{{ end -}}
{{- if $given.caSecret.name }}{{ $_ := set $redis "tls" (dict "ca_file" "/etc/sluice/redis/ca.crt") }}{{ end -}}
{{- toYaml $redis }}
{{- end }}

{{- /* Its Secrets, as files of one volume; nothing where there are none. */ -}}
{{- define "sluice.redisFiles" -}}
{{- $files := dict "ca.crt" .Values.redis.caSecret "password" .Values.redis.passwordSecret "sentinel-password" .Values.redis.sentinel.passwordSecret -}}
{{- range $file, $secret := $files }}{{ if $secret.name }}
- secret: {name: {{ $secret.name }}, items: [{key: {{ $secret.key }}, path: {{ $file }}}]}
{{- end }}{{ end -}}
{{- end }}

{{- /* Where Redis may listen: the ports that are named, and the usual one, which is what others say. */ -}}
{{- define "sluice.redisPorts" -}}
{{- $named := concat .Values.redis.sentinel.nodes .Values.redis.cluster -}}
{{- if .Values.redis.url }}{{ $named = list ((urlParse .Values.redis.url).host) }}{{ end -}}
{{- $ports := list -}}
{{- range $named }}{{ $ports = append $ports (splitList ":" . | last | regexFind "^[0-9]+$" | default "6379") }}{{ end -}}
{{- if not .Values.redis.url }}{{ $ports = append $ports "6379" }}{{ end -}}
{{- range uniq $ports }}
- {port: {{ . }}, protocol: TCP}
{{- end -}}
{{- end }}

{{- /* The gateway's configuration file: what the chart knows, over what `gateway.config` says. */ -}}
{{- define "sluice.config" -}}
{{- $models := list -}}
{{- range $model := .Values.models -}}
  {{- $variants := list -}}
  {{- range $variant := $model.variants -}}
    {{- $full := include "sluice.variant" (dict "root" $ "variant" $variant) | fromYaml -}}
    {{- $name := include "sluice.workerName" (dict "root" $ "model" $model "variant" $variant) -}}
    {{- $found := dict "dns" (printf "%s.%s.svc:8000" $name $.Release.Namespace) "max_concurrency" $full.maxConcurrency "max_num_seqs" (int $full.maxNumSeqs) -}}
    {{- $own := pick $variant "quantization" "quality" "cost" -}}
    {{- $variants = append $variants (merge (dict "name" $variant.name "workers" ($variant.workers | default (list $found))) $own) -}}
  {{- end -}}
  {{- $models = append $models (merge (dict "variants" $variants) (omit $model "variants")) -}}
{{- end -}}
{{- $own := dict
  "listen" (dict "host" "0.0.0.0" "port" 8000)
  "admin" (dict "host" "0.0.0.0" "port" 8001)
  "auth" (dict "enabled" true "secret_file" "/etc/sluice/auth/secret" "key_files" (list "/etc/sluice/auth/keys.json"))
  "redis" (include "sluice.redis" . | fromYaml)
  "models" $models
  "tenants" .Values.tenants
  "drain_notice_s" (int .Values.gateway.drain.noticeSeconds)
  "drain_queue_s" (int .Values.gateway.drain.queueSeconds)
  "drain_timeout_s" (int .Values.gateway.drain.timeoutSeconds) -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.gateway.config) $own) }}
{{- end }}
